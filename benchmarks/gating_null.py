"""What share of parts learned gates call facilitating or interfering where there is nothing to find.

The data are nulls themselves: prompts with answers permuted, and re-initialised weights. They go through `roles` as data would,
with nulls of their own beside them, so no number here is judged by a bar that was set on it.

    python benchmarks/gating_null.py ../shared/models/stories260k-llama ../shared/data/story-behaviours/stories260k-pronoun.jsonl
"""

import argparse
import time
from dataclasses import replace

import numpy as np

from patchclamp.gating import GatingSettings, Roles, gating_settings, roles
from patchclamp.gating.judge import calls, most
from patchclamp.gating.nulls import REINITIALISED, SHUFFLED, on_reinitialised
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.tasks import load_task

CALLED = ("facilitating", "interfering")


def shares(found: Roles) -> dict[str, float]:
    """Shares of parts called either: by gates in any seed, by gates in most seeds, with every safeguard."""
    called = calls(found.gated)
    either = called.facilitating | called.interfering
    return {
        "gates, any seed": float(either.any(0).mean()),
        "gates, most seeds": float((most(called.facilitating) | most(called.interfering)).mean()),
        "with safeguards": float(np.mean([role in CALLED for role in found.table["role"]])),
    }


def cases(model: Model, task: str, kind: str, settings: GatingSettings, draws: int):
    """(name, what `roles` found) of the data as they are, then of each null."""
    split = load_task(task).split(model.tokenizer, None, 0)
    parts = nodes(model)
    fallback = parts.fallback(kind, fit=split.fit)
    yield "the data", roles(parts, split.fit, split.select, fallback, settings)
    for draw in range(draws):
        # seeds far from those of the nulls that `roles` fits beside them
        mine = replace(settings, seed=settings.seed + 100 * (draw + 1))
        fit, select = split.fit.shuffled_answers(50 + draw), split.select.shuffled_answers(70 + draw)
        yield SHUFFLED, roles(parts, fit, select, parts.fallback(kind, fit=fit), mine)
        twin, values = on_reinitialised(parts, split.fit, fallback, 50 + draw)
        yield REINITIALISED, roles(twin, split.fit, split.select, values, mine)


def main() -> None:
    """Print a line per case and the means over draws."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("model")
    ask.add_argument("task")
    ask.add_argument("--fallback", default="resample")
    ask.add_argument("--draws", type=int, default=1)
    ask.add_argument("--budget", default="default")
    asked = ask.parse_args()
    model, settings = Model.load(asked.model), replace(gating_settings(asked.budget), refits=0)
    began, seen = time.perf_counter(), dict[str, list[dict[str, float]]]()
    for name, found in cases(model, asked.task, asked.fallback, settings, asked.draws):
        share = shares(found)
        seen.setdefault(name, []).append(share)
        text = "   ".join(f"{key} {value:6.1%}" for key, value in share.items())
        print(f"{name:24} {text}   ({time.perf_counter() - began:.0f} s)", flush=True)
        began = time.perf_counter()
    for name, found in seen.items():
        mean = {key: float(np.mean([share[key] for share in found])) for key in found[0]}
        print(f"mean of {len(found)}: {name:24} " + "   ".join(f"{key} {value:6.1%}" for key, value in mean.items()))


if __name__ == "__main__":
    main()
