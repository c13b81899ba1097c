"""Models that ship: in folders (`names()`, loaded as `Model.load("zoo/small")`), hand-wired (`wired("induction")`), compiled.

Compiled programs (`program("hist")`) ship in folders, too, without what is known of them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from patchclamp.errors import ModelError

if TYPE_CHECKING:
    from patchclamp.zoo._wired import Wired
    from patchclamp.zoo.compiled import Compiled

__all__ = ["describe", "names", "path", "program", "program_names", "wired", "wired_names"]

ROOM = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The trained and compiled models that ship: every folder here that holds a config.json."""
    return tuple(sorted(config.parent.name for config in ROOM.glob("*/config.json")))


def path(name: str) -> Path:
    """The folder of a trained or compiled model: config, weights, tokenizer, README.

    Raises:
        ModelError: there is no such model.
    """
    if name not in names():
        raise ModelError(f"the zoo has no trained model {name!r}: choose from {', '.join(names())}")
    return ROOM / name


def describe(name: str) -> str:
    """What a model can do and how it was trained or compiled: its README, in Markdown.

    Raises:
        ModelError: there is no such model.
    """
    return (path(name) / "README.md").read_text(encoding="utf-8")


def wired_names() -> tuple[str, ...]:
    """The mechanisms that `wired` builds."""
    from patchclamp.zoo._wired import WIRED

    return WIRED


def wired(name: str, family: str = "gpt2") -> "Wired":
    """Build a hand-wired model with its task and the truth about it: under a second, a million weights, most of them zero.

    Args:
        name: one of `wired_names()`: "induction", "redundant", "interfering", "facts", "and", "or", "backup", "suppressor",
            "switch", "common" or "shared" (which has two tasks: `tasks`).
        family: "gpt2" (closed forms exact to 1e-5 in float64) or "llama" (grouped-query attention; to 1e-5 relative, for its
            norms compute in float32).

    Raises:
        ModelError: there is no such mechanism or family.
    """
    from patchclamp.zoo import _wired

    return _wired.build(name, family)


def program_names() -> tuple[str, ...]:
    """The programs that `program` compiles."""
    from patchclamp.zoo import compiled

    return compiled.program_names()


def program(name: str) -> "Compiled":
    """Compile a program to a transformer without norms, with its task and the edges that are real: in about a second.

    Args:
        name: one of `program_names()`: "reverse", "xproportion", "hist", "sort_unique", "pair_balance", "shuffle_dyck",
            "rotate", "palindrome", "duplicates" or "often".

    Raises:
        ModelError: there is no such program.

    Paper: Lindner et al. 2023, Tracr: Compiled Transformers as a Laboratory for Interpretability, https://arxiv.org/abs/2301.05062.
    """
    from patchclamp.zoo import compiled

    return compiled.build(name)
