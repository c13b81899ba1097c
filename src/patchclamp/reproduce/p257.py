"""P257: relevance patching is nearer to exact effects of MLPs than attribution patching is.

Rezaei Jafari et al. 2025, https://arxiv.org/abs/2508.21258: Pearson with exact effects on indirect object identification, GPT-2 small: MLPs .195
by gradients and .992 by relevance, attention .979 and .962; GPT-2 large MLPs .006 and .956.
"""

from collections.abc import Callable

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.methods import effects, groups_of
from patchclamp.models.model import Model
from patchclamp.parts import gated
from patchclamp.reproduce._figures import points
from patchclamp.reproduce._result import Reproduction, claim, is_called, prompts
from patchclamp.scores.statistics import Interval

PAPER = "RelP, https://arxiv.org/abs/2508.21258"
NUMBERS = {"mlp": (0.195, 0.992), "attn": (0.979, 0.962)}
METHODS = ("gradient", "relevance")


def run(model: Model, n: int, seed: int, progress: Callable[[str, int, int], None]) -> Reproduction:
    """MLP and attention outputs at each position, by both methods and exactly."""
    some, same = prompts(model, "ioi", n, seed).confirm, is_called(model, ("gpt2", "gpt2-small"))
    rows, drawn, differences = [], list[dict[str, object]](), dict[str, Interval]()
    for number, kind in enumerate(NUMBERS):
        progress(kind, number, len(NUMBERS))
        parts = gated(model, [f"L*.{kind}"], ["S2", "end"])
        rule = parts.fallback("resample")
        exact = effects(parts, some, rule, "exact").double().numpy()
        tables = {name: effects(parts, some, rule, name).double().numpy() for name in METHODS}
        found = {name: pearson(table, exact, groups_of(some), seed) for name, table in tables.items()}
        for name, paper in zip(METHODS, NUMBERS[kind], strict=True):
            text = f"{paper:.3f} (GPT-2 small)"
            rows.append(
                claim(f"Pearson of {name} with exact, {kind} outputs", text, found[name][0], paper - 0.1, paper + 0.1, same)
            )
            drawn += [{"site": str(part), "exact": float(e), "score": float(s), "method": f"{name}, {kind}"}
                      for part, e, s in zip(parts.labels, exact.mean(1), tables[name].mean(1), strict=True)]  # fmt: skip
        low, high = np.percentile(found["relevance"][1] - found["gradient"][1], [2.5, 97.5])
        differences[kind] = Interval(found["relevance"][0].mean - found["gradient"][0].mean, float(low), float(high), len(some))
    rows.append(claim("relevance minus gradient, MLP outputs", "+.797 (GPT-2 small)", differences["mlp"], 0.0, 2.0, None))
    figure = points(drawn, "exact", "score", "method", "Scores against exact effects, by method and kind of output.")
    about = {"task": "ioi", "metric": "logit_diff", "fallback": "resample", "n": len(some), "seed": seed}
    return Reproduction("p257", PAPER, model.name, tuple(rows), pl.DataFrame(drawn), figure, about)


def pearson(
    table: Float[np.ndarray, "part example"],
    exact: Float[np.ndarray, "part example"],
    groups: list[str],
    seed: int,
    draws: int = 500,
) -> tuple[Interval, Float[np.ndarray, " draw"]]:
    """Correlation over parts of the means over examples, with its interval over groups, and its value in each draw."""
    names, member = np.unique(groups, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)[:, member]
    many = np.array([np.corrcoef(table @ weight, exact @ weight)[0, 1] for weight in counts])
    low, high = np.percentile(many, [2.5, 97.5])
    return Interval(float(np.corrcoef(table.mean(1), exact.mean(1))[0, 1]), float(low), float(high), table.shape[1]), many
