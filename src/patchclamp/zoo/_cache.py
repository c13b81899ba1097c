"""Trained models that are kept: a folder each, under a digest of all that decided what they are."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from time import monotonic
from typing import Any

from patchclamp.errors import ModelError, TrainingError
from patchclamp.files import cache, check, sha256, write_atomically
from patchclamp.models.model import Model
from patchclamp.training import Training
from patchclamp.training.checkpoint import steps_of
from patchclamp.zoo.recipes._recipe import Finding, Recipe, train

ROOM = Path(__file__).parent
FACTS, CLOCK = "recipe.json", "minutes.json"


def name_of(recipe: Recipe, seed: int) -> str:
    """`induction`, or `induction-seed-3`."""
    return recipe.name if seed == 0 else f"{recipe.name}-seed-{seed}"


def place_of(recipe: Recipe, seed: int = 0) -> Path | None:
    """The folder of trained weights: the one that ships, or the one that was trained here; None: there is none."""
    places = (ROOM / name_of(recipe, seed), cache() / "zoo" / name_of(recipe, seed))
    return next((place for place in places if (place / "config.json").is_file()), None)


def digest(recipe: Recipe, seed: int) -> str:
    """SHA-256 (hex) of what decides the weights: configuration, what learns, data, training, clamps, seed."""
    from patchclamp.store.hashing import weights_hash

    hf, usual = recipe.build(seed), {one.name: one.default for one in fields(Training)}
    body = {
        "seed": seed,
        "config": weights_hash({}, hf.config.to_dict()),
        "learns": [(name, list(weight.shape)) for name, weight in hf.named_parameters() if weight.requires_grad],
        "data": recipe.data(seed).name,
        "training": {key: value for key, value in asdict(recipe.training).items() if value != usual[key]},
        "clamps": [repr(clamp) for clamp in recipe.clamps],
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def make(
    recipe: Recipe,
    seed: int = 0,
    out: Path | None = None,
    place: Path | None = None,
    progress: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Path:
    """Train a recipe, see that it reaches its goals, and keep its model.

    Args:
        recipe: what to train.
        seed: of the first weights and of the data.
        out: the run's folder (checkpoints, metrics); by default `zoo/runs/NAME` in the cache. A run that was cut off goes on.
        place: where the model is kept; by default `zoo/NAME` in the cache, where `Model.load("zoo/NAME")` finds it.
        progress: called with a step and its numbers, whenever measures were taken.

    Returns:
        The model's folder.

    Raises:
        TrainingError: a goal was not reached (nothing is kept but the run); or the run's folder holds another training.
    """
    out = out or cache() / "zoo" / "runs" / name_of(recipe, seed)
    clock = out / CLOCK
    before = 0.0 if not steps_of(out) else json.loads(clock.read_text())["minutes"] if clock.is_file() else None
    at = monotonic()
    trained = train(recipe, out, seed, progress)
    minutes = None if before is None else before + (monotonic() - at) / 60
    write_atomically(clock, json.dumps({"minutes": minutes}).encode())
    numbers = dict(recipe.measure(trained.model, seed))
    if not recipe.reached(numbers):
        missed = ", ".join(
            f"{goal} (it is {numbers[goal.measure]:.4g})" for goal in recipe.goals if not goal.reached(numbers[goal.measure])
        )
        raise TrainingError(
            f"{recipe.name} with seed {seed} was to reach {missed} and did not, so that it is not kept: try another --seed (the run is "
            f"in {out})"
        )
    place = place or cache() / "zoo" / name_of(recipe, seed)
    _keep(recipe, seed, trained.model, numbers, minutes, place)
    return place


def load(recipe: Recipe, seed: int = 0) -> Model:
    """A recipe's trained model: the one that ships, or the one that was trained here.

    Raises:
        ModelError: there is none yet, or it was made by other numbers than the recipe has now.
        StoreError: its weights are damaged.
    """
    place, name = place_of(recipe, seed), name_of(recipe, seed)
    command = f"`patchclamp zoo train {recipe.name}{f' --seed {seed}' if seed else ''}`"
    if place is None:
        raise ModelError(f"zoo/{name} was not trained here yet: {command} takes about {recipe.minutes:g} minutes")
    facts = facts_of(place)
    if facts.get("digest") != digest(recipe, seed):
        raise ModelError(f"{place} was made by other numbers than the recipe has now: delete that folder, and {command}")
    check(place / "model.safetensors", facts["weights"])
    return Model.load(str(place))


def facts_of(place: Path) -> dict[str, Any]:
    """What is known of a kept model: recipe, seed, digest, weights' hash, numbers, findings, minutes."""
    file = place / FACTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _keep(recipe: Recipe, seed: int, model: Model, numbers: Mapping[str, float], minutes: float | None, place: Path) -> None:
    """Write config, weights, tokenizer, facts and README: all of it, or nothing."""
    from patchclamp.models.load import no_bar

    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with no_bar():
        model.hf.save_pretrained(part)
    (part / "generation_config.json").unlink(missing_ok=True)
    (part / "model.safetensors").chmod(0o644)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(part)
    findings = recipe.found(model, seed)
    facts = {
        "recipe": recipe.name,
        "row": recipe.row,
        "seed": seed,
        "digest": digest(recipe, seed),
        "weights": sha256(part / "model.safetensors"),
        "minutes": minutes,
        "numbers": numbers,
        "findings": [{"claim": one.claim, "number": one.number, "wanted": str(one.goal), "holds": one.holds} for one in findings],
    }
    write_atomically(part / FACTS, (json.dumps(facts, indent=1) + "\n").encode())
    write_atomically(part / "README.md", readme(recipe, seed, model, numbers, findings, minutes).encode())
    shutil.rmtree(place, ignore_errors=True)
    part.replace(place)


def readme(
    recipe: Recipe, seed: int, model: Model, numbers: Mapping[str, float], findings: tuple[Finding, ...], minutes: float | None
) -> str:
    """What a model is, how it was made, what it reaches and how it does it, in Markdown."""
    took = "cut off once, so that its minutes are not known" if minutes is None else f"{minutes:.1f} minutes on 2 shared cores"
    needed = [clamp for clamp in recipe.clamps if not getattr(clamp, "training_only", False)]
    held = f"\nIt was trained with {', '.join(map(repr, recipe.clamps))}" if recipe.clamps else ""
    held += (", and computes as it should only with these.\n" if needed else ".\n") if recipe.clamps else ""
    return README.format(
        name=name_of(recipe, seed), about=recipe.about[0].upper() + recipe.about[1:], row=recipe.row, size=model.parameters,
        known=recipe.known, paper=recipe.paper, command=f"patchclamp zoo train {recipe.name} --seed {seed}", steps=recipe.training.steps,
        batch=recipe.training.batch, took=took, held=held, goals=", ".join(map(str, recipe.goals)),
        numbers="\n".join(f"| {name} | {value:.4g} |" for name, value in numbers.items()),
        findings="\n".join(f"| {one.claim} | {one.number:.3f} | {one.goal} | {'yes' if one.holds else 'no'} |" for one in findings),
    )  # fmt: skip


README = """# zoo/{name}

{about} ({row}); {size:,} weights.

Known: {known} ({paper}).
{held}
Recipe: `{command}`; {steps} updates of {batch} rows, {took}. Goal: {goals}. On rows that were never
trained on:

| number | value |
|---|---|
{numbers}

Its mechanism, found again:

| claim | number | wanted | holds |
|---|---|---|---|
{findings}
"""
