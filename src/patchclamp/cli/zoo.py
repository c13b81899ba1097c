"""Commands of the zoo: list, about, train, load."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Json
from patchclamp.errors import PatchclampError

if TYPE_CHECKING:
    from patchclamp.zoo.recipes._recipe import Recipe

Name = Annotated[str, typer.Argument(help="A model, as induction or zoo/induction.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Of the first weights and of the data.", min=0)]

zoo = typer.Typer(
    help="Models with known mechanisms: those that ship, and recipes that train others.",
    no_args_is_help=True,
    add_completion=False,
)


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.add_typer(zoo, name="zoo")


@zoo.command("list")
def listed(as_json: Json = False) -> None:
    """List the models that ship, the recipes that train others, and the models wired by hand."""
    from patchclamp import zoo as shipped
    from patchclamp.zoo.recipes import recipes

    trained = recipes()
    rows = [_row(one) for one in trained.values()]
    others = [
        {"model": f"zoo/{name}", "about": _first_paragraph(shipped.describe(name))}
        for name in shipped.names()
        if name not in trained
    ]
    if as_json:
        common.print_json({"recipes": rows, "trained": others, "wired": list(shipped.wired_names())})
        return
    common.print_rows([{key: row[key] for key in row if key != "known"} for row in rows])
    common.out.print(Text("\nOther models that ship:\n"))
    common.print_rows(others)
    common.out.print(Text(f'Wired by hand, for tests: patchclamp.zoo.wired("NAME"), NAME: {", ".join(shipped.wired_names())}'))


@zoo.command("about")
def about(name: Name, as_json: Json = False) -> None:
    """Tell all about one model: what is known of it, how it was made, what it reaches, how its mechanism was found again."""
    from patchclamp import zoo as shipped
    from patchclamp.errors import ModelError
    from patchclamp.zoo.recipes import recipes

    own = name.removeprefix("zoo/")
    try:
        text = shipped.describe(own)
    except ModelError:
        if own not in recipes():
            known = sorted({*shipped.names(), *recipes()})
            raise ModelError(f"the zoo has no model {own!r}: choose from {', '.join(known)}") from None
        text = _untrained(recipes()[own])
    if as_json:
        common.print_json({"model": f"zoo/{own}", "about": text})
    else:
        common.out.print(Markdown(text))


@zoo.command("train")
def train(
    name: Name,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="The run's folder (checkpoints, metrics); by default in the cache.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model by its recipe, see that it reaches its goals, and keep it: `Model.load("zoo/NAME")` finds it.

    One that is there already is trained anew only where --out is given. A run that was cut off goes on.
    """
    from patchclamp.zoo import _cache
    from patchclamp.zoo import train as run
    from patchclamp.zoo.recipes import recipe

    common.quiet()
    one = recipe(name)
    goals = ", ".join(map(str, one.goals))
    with common.err.status(f"training {one.name} to {goals}: about {one.minutes:g} minutes") as status:

        def tell(step: int, numbers: Mapping[str, float]) -> None:
            shown = ", ".join(f"{goal.measure} {numbers[goal.measure]:.3g}" for goal in one.goals)
            status.update(f"training {one.name} to {goals}: update {step} of {one.training.steps}, {shown}")

        run(one.name, seed, out, tell)
    _tell(_cache.name_of(one, seed), _cache.place_of(one, seed), as_json)


@zoo.command("load")
def load(name: Name, seed: Seed = 0, as_json: Json = False) -> None:
    """Check a trained model (weights against their hash, numbers against its recipe), and say where it is and what it reaches."""
    from patchclamp import zoo as shipped
    from patchclamp.zoo import _cache
    from patchclamp.zoo.recipes import recipe, recipes

    common.quiet()
    own = name.removeprefix("zoo/")
    if own in shipped.names() and own not in recipes():
        raise PatchclampError(
            f"zoo/{own} ships and has no recipe to check it by: Model.load('zoo/{own}') loads it, `zoo about {own}` tells of it"
        )
    one = recipe(name)
    _cache.load(one, seed)
    _tell(_cache.name_of(one, seed), _cache.place_of(one, seed), as_json)


def _tell(name: str, place: Path | None, as_json: bool) -> None:
    """A kept model's folder, numbers and findings."""
    from patchclamp.zoo._cache import facts_of

    if place is None:
        raise PatchclampError(f"zoo/{name} was made and is gone: another process took its folder away; train it again")
    facts = facts_of(place)
    if as_json:
        common.print_json({"model": f"zoo/{name}", "folder": str(place), **facts})
        return
    common.out.print(Text.assemble((f"zoo/{name}", "bold"), f" in {place}"))
    common.out.print(Text(", ".join(f"{key} {value:.4g}" for key, value in facts["numbers"].items())))
    common.print_rows(facts["findings"])


def _row(one: "Recipe") -> dict[str, object]:
    from patchclamp.zoo._cache import ROOM, place_of

    place = place_of(one)
    there = "to be trained" if place is None else "ships" if place.parent == ROOM else "trained here"
    return {
        "model": f"zoo/{one.name}",
        "row": one.row,
        "weights": there,
        "minutes": round(one.minutes),
        "goal": str(one.goals[0]),
        "known": one.known,
    }


def _untrained(one: "Recipe") -> str:
    return (
        f"# zoo/{one.name}\n\n{one.about[0].upper()}{one.about[1:]} ({one.row}). Not trained here yet: `patchclamp zoo train {one.name}` "
        f"takes about {one.minutes:g} minutes.\n\nKnown: {one.known} ({one.paper}).\n\nGoal: {', '.join(map(str, one.goals))}.\n"
    )


def _first_paragraph(markdown: str) -> str:
    paragraphs = (paragraph for paragraph in markdown.split("\n\n") if not paragraph.startswith("#"))
    return " ".join(next(paragraphs, "").split())
