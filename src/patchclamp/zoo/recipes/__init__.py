"""How the trained models of the zoo are made: one recipe a file. The folder is the registry.

`recipes()` has those that `patchclamp zoo train NAME` trains. `small` and `siit` have trainers of their own (they learn from texts
and from interventions on a program): `python -m patchclamp.zoo.recipes.NAME --out FOLDER`.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from patchclamp.errors import ModelError

if TYPE_CHECKING:
    from patchclamp.zoo.recipes._recipe import Recipe

OWN = ("siit", "small")
"""Files with a trainer of their own."""

__all__ = ["OWN", "recipe", "recipes"]


@cache
def recipes() -> "dict[str, Recipe]":
    """Every recipe of every file here, by name, in the order of the papers' rows."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    found = [one for file in files if file not in OWN for one in import_module(f"{__name__}.{file}").RECIPES]
    return {one.name: one for one in sorted(found, key=lambda one: int(one.row[1:]))}


def recipe(name: str) -> "Recipe":
    """The recipe of a name, with or without `zoo/` before it.

    Raises:
        ModelError: there is none.
    """
    own = name.removeprefix("zoo/")
    if own not in recipes():
        raise ModelError(f"there is no recipe {own!r}: choose from {', '.join(recipes())}")
    return recipes()[own]
