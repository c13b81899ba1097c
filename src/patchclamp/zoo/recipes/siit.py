"""zoo/siit_NAME: a small transformer trained to compute what a compiled program computes, part by part.

    python -m patchclamp.zoo.recipes.siit --program sort_unique --out FOLDER

Strict interchange intervention training (Gupta et al. 2407.14494). Every part of the program (its heads and MLPs that write
anything) is given to one part of the model. With base and source inputs drawn at random, the loss is the sum of

    behaviour   the model's output on the base                                    = the program's on the base
    interchange a given part takes its value on the source, in model and program   = the program's output then
    strict      (times .4) a part that is given to nothing takes its value on the source = the program's output on the base

each a cross-entropy at every position. So weights are learned, as in a language model, and yet which parts matter is known.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp.errors import ModelError
from patchclamp.zoo.compiled import Compiled, build
from patchclamp.zoo.recipes._exchange import draw, forward, loss_of

if TYPE_CHECKING:
    from patchclamp.models.normless import NormlessForCausalLM


@dataclass(frozen=True)
class Recipe:
    """Every number of the training."""

    program: str = "sort_unique"
    seed: int = 0
    layers: int = 2
    heads: int = 4
    width: int = 32
    head_width: int = 8
    neurons: int = 64
    batch: int = 128
    rate: float = 3e-3
    strict: float = 0.4
    most: int = 4000
    every: int = 200
    goal: float = 0.995


@dataclass(frozen=True)
class Report:
    """Shares of positions at which the model says what it is to say, on inputs of the task's length.

    Args:
        behaviour: as it is.
        interchange: by given part, with that part's value exchanged.
        strict: by part that is given to nothing, with its value exchanged.
    """

    behaviour: float
    interchange: Mapping[str, float]
    strict: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The smallest of all."""
        return min(self.behaviour, *self.interchange.values(), *self.strict.values())


def given(one: Compiled, recipe: Recipe) -> dict[str, str]:
    """Which part of the model each part of the program is given to: heads in a drawn order, in their own layers.

    Raises:
        ModelError: the program has more layers, or more heads in one, than the model.
    """
    blueprint, draws = one.blueprint, random.Random(recipe.seed)
    if len(blueprint.heads) > recipe.layers or max(map(len, blueprint.heads)) > recipe.heads:
        raise ModelError(
            f"{recipe.program} has {len(blueprint.heads)} layers of up to {max(map(len, blueprint.heads))} heads, and the model "
            f"{recipe.layers} of {recipe.heads}: give it as many"
        )
    found: dict[str, str] = {}
    for layer, (heads, mlp) in enumerate(zip(blueprint.heads, blueprint.mlps, strict=True)):
        places = draws.sample(range(recipe.heads), len(heads))
        found |= {f"L{layer}.h{number}": f"L{layer}.h{place}" for number, place in enumerate(places)}
        if mlp.write.size:
            found[f"L{layer}.mlp"] = f"L{layer}.mlp"
    return found


def true_edges(one: Compiled, places: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """(source, part or logits that reads it): the program's live edges under resample, as the model has them.

    Training says nothing of whether a head reads by its queries, keys or values, so an edge goes to the head as a whole.
    """
    found: set[tuple[str, str]] = set()
    for edge in one.truth.resample:
        source, target = (
            half.replace(".kv", ".h").removesuffix(".q").removesuffix(".k").removesuffix(".v") for half in edge.split(">")
        )
        found.add((places.get(source, source), places.get(target, target)))
    return frozenset(found)


def parts_of(recipe: Recipe) -> list[str]:
    """Every head and MLP of the model."""
    return [
        part for layer in range(recipe.layers) for part in (*(f"L{layer}.h{h}" for h in range(recipe.heads)), f"L{layer}.mlp")
    ]


@torch.no_grad()
def report(model: "NormlessForCausalLM", one: Compiled, places: Mapping[str, str], recipe: Recipe, seed: int = 1) -> Report:
    """How well it does on 256 new inputs for each part. Positions at which the program says a mixture are left out."""
    rng, used = np.random.default_rng([recipe.seed, seed]), set(places.values())

    def right(logits: Tensor, wanted: Tensor) -> float:
        clear = wanted.max(-1).values > 0.99
        return float((logits[:, 1:].argmax(-1) == wanted.argmax(-1))[clear].float().mean())

    def share(part: str | None, mine: str) -> tuple[float, float]:
        """With `mine` exchanged, as `part` of the program where it is one; and as it is."""
        drawn = draw(one, 256, part, rng)
        source = forward(model, drawn.source)[1]
        plain, logits = forward(model, drawn.base)[0], forward(model, drawn.base, {mine: source[mine]})[0]
        return right(logits, drawn.exchanged), right(plain, drawn.plain)

    exchanged = {part: share(part, mine) for part, mine in places.items()}
    kept = {mine: share(None, mine) for mine in parts_of(recipe) if mine not in used}
    behaviour = float(np.mean([plain for found in (exchanged, kept) for _, plain in found.values()]))
    first = [{part: value for part, (value, _) in found.items()} for found in (exchanged, kept)]
    return Report(behaviour, *first)


def build_model(one: Compiled, recipe: Recipe) -> "NormlessForCausalLM":
    """The model with random weights."""
    from patchclamp.models.normless import NormlessConfig, NormlessForCausalLM

    torch.manual_seed(recipe.seed)
    config = NormlessConfig(
        vocab_size=len(one.blueprint.vocabulary), hidden_size=recipe.width, intermediate_size=recipe.neurons,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, head_dim=recipe.head_width, hidden_act="gelu",
        max_position_embeddings=len(one.blueprint.positions), initializer_range=0.2,
    )  # fmt: skip
    return NormlessForCausalLM(config)


def train(recipe: Recipe, log: Path | None = None) -> tuple["NormlessForCausalLM", Report, int]:
    """Train until every share of the report has reached the goal, or updates are up: model, report, updates."""
    one = build(recipe.program)
    places = given(one, recipe)
    unused = [part for part in parts_of(recipe) if part not in places.values()]
    model, rng = build_model(one, recipe), np.random.default_rng(recipe.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98))
    found, step = report(model, one, places, recipe), 0
    for step in range(1, recipe.most + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, step / 100, 1.2 * (1 - step / (recipe.most + 1)))
        part = list(places)[int(rng.integers(len(places)))]
        drawn = draw(one, recipe.batch, part, rng)
        optimizer.zero_grad()
        loss_of(model, drawn, places[part], unused[int(rng.integers(len(unused)))], recipe.strict).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % recipe.every == 0:
            found = report(model, one, places, recipe)
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"{step} {found}\n")
            if found.worst >= recipe.goal:
                break
    return model.eval(), found, step


def ship(recipe: Recipe, out: Path) -> Report:
    """Train, and write config, weights, tokenizer, which part does what, and README."""
    begun, one = time.monotonic(), build(recipe.program)
    out.mkdir(parents=True, exist_ok=True)
    model, found, steps = train(recipe, out.parent / f"{out.name}.log")
    places = given(one, recipe)
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "model.safetensors").chmod(0o644)
    one.tokenizer.save_pretrained(out)
    facts = {
        "program": recipe.program,
        "given": places,
        "edges": sorted(map(list, true_edges(one, places))),
        "recipe": asdict(recipe),
    }
    (out / "truth.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    rows = {"as it is": found.behaviour}
    rows |= {f"{places[part]} exchanged, as {part} of the program": share for part, share in found.interchange.items()}
    rows |= {f"{part} exchanged, which is given to nothing": share for part, share in found.strict.items()}
    (out / "README.md").write_text(
        README.format(
            name=out.name, size=sum(p.numel() for p in model.parameters()), steps=steps, minutes=(time.monotonic() - begun) / 60,
            table="\n".join(f"| {what} | {share:.1%} |" for what, share in rows.items()),
            places=", ".join(f"{part} -> {place}" for part, place in places.items()), **asdict(recipe),
        ),
        encoding="utf-8",
    )  # fmt: skip
    return found


README = """# zoo/{name}

A transformer of {layers} layers with {heads} heads each, GELU, no norms, width {width}, {size:,} weights, trained to compute
what zoo/{program} computes, part by part (strict interchange intervention training): {places}. All other parts are given to nothing.
Task: `zoo/{program}`. Which edges are real: truth.json.

Recipe: `python -m patchclamp.zoo.recipes.siit --program {program} --seed {seed} --out FOLDER`; {steps} updates of {batch} pairs,
{minutes:.0f} minutes on 2 shared cores. Share of positions that are right, on new inputs:

| what | right |
|---|---|
{table}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a model by strict interchange interventions on a compiled program.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--program", default=Recipe.program)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=Recipe.most, help="updates at most")
    chosen = parser.parse_args(arguments)
    print(ship(Recipe(program=chosen.program, seed=chosen.seed, most=chosen.most), chosen.out))


if __name__ == "__main__":
    main()
