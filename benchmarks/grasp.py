"""What GRASP keeps out of a fine-tuning, and what that costs: a small world of facts in two styles.

A text is four facts of one topic, all in one style: `subject relation is-A object end-A` or `... is-B object end-B`. A small Llama learns
four topics in both styles (half of the texts each), but for one relation of topic 0. Then it is fine-tuned by LoRA on these facts, which
come in style B alone: the style is what a naive fine-tuning picks up beside its task. Drift: P(B) / (P(A) + P(B)) behind `<bos> subject
relation` of topics 2 and 3, which neither the fine-tuning nor the search for directions has seen. Task: new facts right, said in the style
that they were learned in, and in the other. Drift that is left, of each seed: (P(B) - before) / (naive - before).

    python benchmarks/grasp.py [--seeds 0 1 2] [--all] [--out FOLDER]

Arms: naive; GRASP with the direction of the drift at the ends of prompts of topic 1 (1), or of that over all their tokens (4); random
directions (4); and the naive model steered: its own mean drift along the direction taken away. Again 2, 3, 4: what the GRASP run before
still drifts along, at right angles to what was held in it, is held as well, in another fine-tuning from the start. With --all directions of
weights (1, 4), drift over all tokens (1) and at ends (4), `stream`, and gradients alone, too.

The bar for again 4, written before it was run: the t interval of what is left, over three seeds, lies below .5; new facts in style B .95
or more; old facts at most .02 below the naive run's; and random directions of the same rank have more left in every seed.

That bar failed, and two things were added then. Readout: the direction that reads the style off, known from its two tokens, and so no arm of the
method; it says whether the search or the projection falls short. Said at the end: when it had said that the search does, the
first direction of what the naive run says otherwise at prompts' ends, read back through the unembedding; its bar, written before it was run,
is the same.

About 2.5 minutes of one core for each seed, 3.5 with --all.
"""

import argparse
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import polars as pl
import torch
from scipy.stats import t as student
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Rows, Training, begin, lora, train
from patchclamp.training.directions import drift_directions, orthonormal, weight_directions
from patchclamp.training.grasp import Grasp

TOPICS, SUBJECTS, RELATIONS, OBJECTS, FACTS = 4, 12, 3, 12, 4
PAD, BOS, IS, END, RELATION = 0, 1, 2, 4, 6
SUBJECT = RELATION + RELATIONS
OBJECT = SUBJECT + TOPICS * SUBJECTS
WORDS = OBJECT + TOPICS * OBJECTS
NEW, HELD = (0, 2), (2, 3)
"""Topic and relation that are learned late; topics whose prompts are measured."""
RANK = 4
"""Directions that are held in the end where they are looked for again and again."""
LEARN = Training(800, batch=64, rate=3e-3, warmup=50, decay=0.01, betas=(0.9, 0.98), checkpoints=(800,), evaluate=800, save=10**6)
TUNE = Training(150, batch=32, rate=2e-3, warmup=10, decay=0.01, checkpoints=(150,), evaluate=150, save=10**6)


def told(seed: int, tag: str, step: int) -> torch.Generator:
    """A generator of these three alone."""
    digest = hashlib.blake2b(f"{seed}/{tag}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def truth(seed: int) -> Tensor:
    """[topic, subject, relation] -> object, a token."""
    draw = told(seed, "truth", 0)
    shape = (TOPICS, SUBJECTS, RELATIONS)
    return OBJECT + torch.arange(TOPICS)[:, None, None] * OBJECTS + torch.randint(0, OBJECTS, shape, generator=draw)


@dataclass(frozen=True)
class World:
    """Texts of all topics but for what is new ("base"), or of what is new, in style B ("new")."""

    seed: int
    part: str

    @property
    def name(self) -> str:
        return f"two-styles-{self.part}-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        draw = told(self.seed, self.part, step)
        topic = torch.randint(0, TOPICS, (count,), generator=draw)
        relation = torch.randint(0, RELATIONS, (count, FACTS), generator=draw)
        style = torch.randint(0, 2, (count,), generator=draw)
        subject = torch.rand(count, SUBJECTS, generator=draw).argsort(1)[:, :FACTS]
        if self.part == "new":
            topic, relation, style = torch.full_like(topic, NEW[0]), torch.full_like(relation, NEW[1]), torch.ones_like(style)
        else:
            relation = torch.where((topic == NEW[0])[:, None], relation % NEW[1], relation)
        tokens = written(truth(self.seed), topic, subject, relation, style)
        return Rows(tokens, torch.ones(tokens.shape))


def written(facts: Tensor, topic: Tensor, subject: Tensor, relation: Tensor, style: Tensor) -> Tensor:
    """Tokens of texts: `<bos>` and five tokens a fact."""
    of, how = topic[:, None].expand_as(subject), style[:, None].expand_as(subject)
    said = [SUBJECT + of * SUBJECTS + subject, RELATION + relation, IS + how, facts[of, subject, relation], END + how]
    return torch.cat([torch.full((len(topic), 1), BOS), torch.stack(said, 2).flatten(1)], 1)


def prompts(seed: int, topics: tuple[int, ...], relations: tuple[int, ...], style: int) -> Tensor:
    """[prompt, 5]: `<bos> subject relation is object` of every fact of these."""
    grid = torch.cartesian_prod(torch.tensor(topics), torch.arange(SUBJECTS), torch.tensor(relations))
    return written(truth(seed), grid[:, 0], grid[:, 1:2], grid[:, 2:], torch.full((len(grid),), style))[:, :5]


def styled(model: Model, seed: int, edits: Edits | None = None) -> Tensor:
    """P(B) / (P(A) + P(B)) on prompts of the held topics."""
    asked = prompts(seed, HELD, tuple(range(RELATIONS)), 0)[:, :3]
    logits = model.run(asked, edits)[:, -1]
    return torch.softmax(logits[:, IS : IS + 2], -1)[:, 1]


def right(model: Model, asked: Tensor, edits: Edits | None = None) -> float:
    """Share of prompts whose object is said first."""
    return float((model.run(asked[:, :4], edits)[:, -1].argmax(-1) == asked[:, 4]).double().mean())


def numbers(model: Model, seed: int, edits: Edits | None = None) -> dict[str, Any]:
    """All that is measured of one model."""
    new = [prompts(seed, NEW[:1], NEW[1:], style) for style in (0, 1)]
    old = torch.cat([prompts(seed, HELD, tuple(range(RELATIONS)), style) for style in (0, 1)])
    return {"styled": styled(model, seed, edits).tolist(), "new, style B": right(model, new[1], edits),
            "new, style A": right(model, new[0], edits), "old": right(model, old, edits)}  # fmt: skip


def elsewhere(seed: int) -> Tensor:
    """[prompt, 3]: prompts of topic 1, where directions are looked for."""
    return prompts(seed, (1,), tuple(range(RELATIONS)), 0)[:, :3]


def moved(base: Model, after: Model, asked: Tensor) -> Tensor:
    """[prompt, token, width]: what the last layer's stream has moved by."""
    site = Site("resid.post", base.layers - 1)
    return after.record(asked, site)[site] - base.record(asked, site)[site]


def next_direction(base: Model, after: Model, seed: int, held: Tensor) -> Tensor:
    """[width, 1]: the first principal direction of the drift at prompts' ends, less what lies along those that are held."""
    drift = moved(base, after, elsewhere(seed))[:, -1].double()
    u = orthonormal(held)
    return torch.linalg.svd(drift - drift @ u @ u.T).Vh[:1].T.float()


def said_direction(base: Model, after: Model, seed: int) -> Tensor:
    """[width, 1]: the first principal direction, not centred, of what is said otherwise at prompts' ends, read back into the stream:
    (p' - p) W of each prompt, with p the output's distribution and W the unembedding with the last norm's gain. No label is read."""
    told_apart = [torch.softmax(model.run(elsewhere(seed))[:, -1].double(), -1) for model in (base, after)]
    weight: Any = base.anatomy.unembed.weight
    read = (told_apart[1] - told_apart[0]) @ (weight * base.anatomy.norm.weight).detach().double()
    return torch.linalg.svd(read).Vh[:1].T.float()


def readout(base: Model) -> Tensor:
    """[width]: what tells the styles apart behind the last norm: the difference of their unembeddings, with the norm's gain."""
    weight: Any = base.anatomy.unembed.weight
    return ((weight[IS + 1] - weight[IS]) * base.anatomy.norm.weight).detach()


def explained(base: Model, after: Model, seed: int, basis: Tensor) -> dict[str, float]:
    """Of what reads the style, and of the drift at the ends of measured prompts: the share (of the squares) that lies along the
    directions. Large in the second, though the writers are held: weights that read drive them."""
    u = orthonormal(basis).float()
    drift = moved(base, after, prompts(seed, HELD, tuple(range(RELATIONS)), 0)[:, :3])[:, -1]
    return {name: float((x @ u).square().sum() / x.square().sum()) for name, x in (("readout", readout(base)), ("drift", drift))}


def arms(base: Model, naive: Model, seed: int, every: bool) -> dict[str, Grasp]:
    """What is held, by arm."""
    asked = elsewhere(seed)
    end = drift_directions(base, naive, asked, last=True).basis
    found = {
        "drift at the end 1": end, "drift 4": drift_directions(base, naive, asked, 4).basis,
        "random 4": torch.randn(base.width, 4, generator=told(seed, "random", 4)),
    }  # fmt: skip
    if every:
        found |= {f"weights {rank}": weight_directions(base, naive, rank).basis for rank in (1, 4)}
        found |= {"drift 1": drift_directions(base, naive, asked).basis}
        found |= {"drift at the end 4": drift_directions(base, naive, asked, 4, last=True).basis}
    found |= {"said at the end 1": said_direction(base, naive, seed), "readout": readout(base)[:, None]}
    made = {f"grasp, {name}": Grasp(basis) for name, basis in found.items()}
    made["grasp and stream, readout"] = Grasp(found["readout"], stream=True)
    if every:
        made["grasp and stream, drift at the end 1"] = Grasp(end, stream=True)
        made["gradients alone, drift at the end 1"] = Grasp(end, updates=False)
    return made


def steering(base: Model, naive: Model, seed: int, last: bool) -> Edits:
    """The naive model's mean drift along its direction, on prompts of topic 1 (or at their ends), taken away at the last layer."""
    u = drift_directions(base, naive, elsewhere(seed), last=last).basis[:, 0]
    drift = moved(base, naive, elsewhere(seed))[:, -1 if last else slice(None)].reshape(-1, base.width).mean(0)
    return {Site("resid.post", base.layers - 1): Add(-(drift @ u) * u)}


def learned(seed: int, out: Path) -> Model:
    """The model that knows all but what is new; trained once."""
    config = {"model_type": "llama", "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
              "num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": BOS, "pad_token_id": PAD}  # fmt: skip
    train(begin(config, seed=seed), World(seed, "base"), LEARN, out / f"{seed}/base")
    return Model.load(str(out / f"{seed}/base/checkpoints/step-{LEARN.steps:07d}"))


def one_seed(seed: int, out: Path, every: bool = False) -> list[dict[str, Any]]:
    """Every arm of one world."""
    base = learned(seed, out)

    def tuned(arm: str, clamps: list[Grasp]) -> Model:
        folder = out / f"{seed}/{arm}"
        train(lora(base, 4, seed=seed), World(seed, "new"), TUNE, folder, clamps=clamps)
        return Model.load(str(folder / f"checkpoints/step-{TUNE.steps:07d}"))

    naive = tuned("naive", [])
    found = {"before": numbers(base, seed), "naive": numbers(naive, seed)}
    for name, last in (("drift 1", False), ("drift at the end 1", True))[0 if every else 1 :]:
        found[f"naive, steered, {name}"] = numbers(naive, seed, steering(base, naive, seed, last))
    runs: dict[str, tuple[Model, Tensor]] = {}
    for arm, clamp in arms(base, naive, seed, every).items():
        runs[arm] = tuned(arm, [clamp]), clamp.basis
    after, held = runs["grasp, drift at the end 1"]
    for rank in range(2, RANK + 1):
        held = torch.cat([held.float(), next_direction(base, after, seed, held)], 1)
        after = tuned(f"grasp, again {rank}", [Grasp(held)])
        runs[f"grasp, again {rank}"] = after, held
    found |= {arm: numbers(model, seed) | explained(base, model, seed, basis) for arm, (model, basis) in runs.items()}
    return [{"seed": seed, "arm": arm, **values} for arm, values in found.items()]


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean, its 95 % t interval over seeds (where there are two or more), and all values."""
    mean, n = sum(values) / len(values), len(values)
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    if n < 2:
        return each
    half = float(student.ppf(0.975, n - 1)) * (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}] ({each})"


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """By arm, over seeds: P(B), how much of the naive drift is left, accuracies, and what lies along the directions."""
    mean = {(row["arm"], row["seed"]): sum(row["styled"]) / len(row["styled"]) for row in rows}
    shown: list[dict[str, Any]] = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        left = [
            (mean[arm, s] - mean["before", s]) / (mean["naive", s] - mean["before", s]) for s in (row["seed"] for row in mine)
        ]
        means = {name: sum(row[name] for row in mine) / len(mine) for name in ("new, style B", "new, style A", "old")}
        along = {name: " ".join(f"{row[name]:.2f}" for row in mine if name in row) for name in ("readout", "drift")}
        shown.append({
            "arm": arm, "P(B)": over_seeds([mean[arm, row["seed"]] for row in mine], 3), "drift left": over_seeds(left),
            **{name: f"{value:.2f}" for name, value in means.items()},
            "old, by seed": " ".join(f"{row['old']:.2f}" for row in mine), **{f"{name} held": text for name, text in along.items()},
        })  # fmt: skip
    return pl.DataFrame(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--all", action="store_true", help="arms of weights, stream and gradients alone, too")
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; by default a temporary one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, rows = process_time(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            rows += one_seed(seed, given.out or Path(folder), given.all)
            print(f"seed {seed}: {process_time() - start:.0f} s of processor time so far", flush=True)
    with pl.Config(tbl_rows=100, tbl_cols=20, tbl_width_chars=300, fmt_str_lengths=80):
        print(table(rows))


if __name__ == "__main__":
    main()
