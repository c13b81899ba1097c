"""Models that ship: in folders (`names()`, loaded as `Model.load("zoo/small")`), hand-wired (`wired("induction")`), compiled.

Others are trained by a recipe (`recipe_names()`, `train("grokking")`) and kept in the cache, where `Model.load("zoo/grokking")` finds
them. Compiled programs (`program("hist")`) ship in folders, too, without what is known of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from patchclamp.errors import ModelError
from patchclamp.files import cache

if TYPE_CHECKING:
    from patchclamp.models.model import Model
    from patchclamp.zoo._wired import Wired
    from patchclamp.zoo.compiled import Compiled

__all__ = ["describe", "load", "names", "path", "program", "program_names", "recipe_names", "train", "wired", "wired_names"]

ROOM = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The trained and compiled models that ship: every folder here that holds a config.json."""
    return tuple(sorted(config.parent.name for config in ROOM.glob("*/config.json")))


def path(name: str) -> Path:
    """The folder of a trained or compiled model, that ships or was trained here: config, weights, tokenizer, README.

    Raises:
        ModelError: there is no such model.
    """
    trained = cache() / "zoo" / name
    if name in names():
        return ROOM / name
    if Path(name).name == name and (trained / "config.json").is_file():
        return trained
    raise ModelError(
        f"the zoo has no trained model {name!r}: choose from {', '.join(names())}; `patchclamp zoo list` has recipes"
    )


def describe(name: str) -> str:
    """What a model can do and how it was trained or compiled: its README, in Markdown.

    Raises:
        ModelError: there is no such model.
    """
    return (path(name) / "README.md").read_text(encoding="utf-8")


def recipe_names() -> tuple[str, ...]:
    """The models that `train` makes, by recipes kept in `zoo/recipes`, in the order of the papers' rows."""
    from patchclamp.zoo.recipes import recipes

    return tuple(recipes())


def train(
    name: str, seed: int = 0, out: Path | None = None, progress: "Callable[[int, Mapping[str, float]], None] | None" = None
) -> "Model":
    """Train a recipe's model and keep it in the cache; one that is there already, whole and by the same numbers, is loaded.

    Args:
        name: of a recipe.
        seed: of the first weights and the data.
        out: the run's folder (checkpoints, metrics); by default in the cache. A run that was cut off goes on.
        progress: called with a step and its numbers, whenever measures were taken.

    Raises:
        ModelError: there is no such recipe.
        TrainingError: its goal was not reached, so that nothing is kept; or `out` holds another training.

    Cost: the recipe's minutes.
    """
    from patchclamp.zoo import _cache
    from patchclamp.zoo.recipes import recipe

    one = recipe(name)
    if out is not None or _cache.place_of(one, seed) is None:
        _cache.make(one, seed, out, progress=progress)
    return _cache.load(one, seed)


def load(name: str, seed: int = 0) -> "Model":
    """A recipe's trained model, its weights checked against their hash and its numbers against the recipe's.

    Raises:
        ModelError: there is no such recipe, or it was not trained here yet, or by other numbers.
        StoreError: the weights are damaged.
    """
    from patchclamp.zoo import _cache
    from patchclamp.zoo.recipes import recipe

    return _cache.load(recipe(name), seed)


def wired_names() -> tuple[str, ...]:
    """The mechanisms that `wired` builds."""
    from patchclamp.zoo._wired import WIRED

    return WIRED


def wired(name: str, family: str = "gpt2") -> "Wired":
    """Build a hand-wired model with its task and the truth about it: under a second, a million weights, most of them zero.

    Args:
        name: one of `wired_names()`: "induction", "redundant", "interfering", "facts", "and", "or", "backup", "suppressor",
            "switch", "phases", "common", "shared" or "formats" (the last two have two tasks each: `tasks`).
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
