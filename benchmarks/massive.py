"""Do massive activations grow along the five-parameter curve, and does the architecture foretell it? Backcopy in nine sizes.

Gallego-Feliciano et al. 2025 (https://arxiv.org/abs/2508.03616) fit ratio(t) = A e^(-l x) log x + K, x = g t + t0, to the largest activation
over the median at the checkpoints of Pythia models, and regress the parameters on the architecture. Here: transformers without norms on
Bigram-Backcopy, 1 to 3 layers by width 16, 32 and 64, the ratio of the residual stream behind the last block on 32 rows that are never
trained on, at 24 log-spaced steps.

    ratio       at the first and at the last step
    R2          of the curve
    foretold    1 - squared errors / squares about the other models' mean, leaving one model out, by parameter (logarithms of those that
                are positive): above 0 the architecture says something. Beside it the same of the whole curve: R2 of the curve with foretold
                parameters on that model's own values, and of the mean of all other models' curves.

    python benchmarks/massive.py --out FOLDER [--steps 400] [--seeds 0]

About 1.5 minutes of one core for a seed.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch

from patchclamp.models.model import Model
from patchclamp.training import Training, log_spaced, train
from patchclamp.units import foretell, growth, massive
from patchclamp.units.growth import Curve
from patchclamp.zoo.recipes.backcopy import Backcopy, build

SIZES = tuple((layers, width) for layers in (1, 2, 3) for width in (16, 32, 64))
ROWS, POINTS = 32, 24


def ratio(model: Model, step: int, *, tokens: torch.Tensor, steps: tuple[int, ...]) -> Mapping[str, float]:
    """The last block's ratio, at the steps that are looked at."""
    if step not in steps:
        return {}
    found = massive(model, tokens).filter(part=f"L{model.layers - 1}.resid.post", name="ratio")
    return {"ratio": float(found["value"][0])}


def followed(layers: int, width: int, seed: int, steps: int, out: Path) -> tuple[list[int], list[float]]:
    """Steps and ratios of one training."""
    data, looked = Backcopy(seed), log_spaced(steps, POINTS)
    plan = Training(steps, batch=16, rate=4e-3, schedule="constant", warmup=20, betas=(0.9, 0.98), checkpoints=(0,), evaluate=1)
    run = train(
        Model.load(build(seed, layers, width)), data, plan, out / f"{layers}-{width}-{steps}/seed-{seed}",
        measures=[partial(ratio, tokens=data.rows(-1, ROWS).tokens, steps=looked)],
    )  # fmt: skip
    found = run.curve("ratio")
    return found["step"].to_list(), found["value"].to_list()


def logs(curve: Curve) -> list[float]:
    """The parameters as they are regressed: decay, rate and start as logarithms."""
    return [curve.amplitude, np.log(curve.decay), np.log(curve.rate), np.log(curve.start), curve.offset]


def told(values: np.ndarray) -> Curve:
    """The curve of parameters as they are regressed."""
    amplitude, decay, rate, start, offset = values
    return Curve(amplitude, float(np.exp(decay)), float(np.exp(rate)), float(np.exp(start)), offset, 0.0, {}, {}, 0)


def explained(values: np.ndarray, curve: np.ndarray) -> float:
    """R2."""
    return 1 - float(((values - curve) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; what is there is gone on with")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        seen = {size: followed(*size, seed, given.steps, given.out) for size in SIZES}
        curves = {size: growth(*both, resamples=0) for size, both in seen.items()}
        forecast, share = foretell(
            np.log(np.array(SIZES, dtype=float)), np.array([logs(curve) for curve in curves.values()]), ridge=0.1
        )
        rows: list[dict[str, object]] = []
        for number, (size, curve) in enumerate(curves.items()):
            steps, values = np.array(seen[size][0], dtype=float), np.array(seen[size][1])
            others = np.mean([seen[other][1] for other in SIZES if other != size], axis=0)  # at the same steps
            rows.append({
                "layers": size[0], "width": size[1], "first": values[0], "last": values[-1], "largest": values.max(), "R2": curve.r2,
                "A": curve.amplitude, "l": curve.decay, "g": curve.rate, "t0": curve.start, "K": curve.offset,
                "R2 foretold": explained(values, told(forecast[number]).at(steps)), "R2 others": explained(values, others),
            })  # fmt: skip
        with pl.Config(tbl_rows=20, tbl_cols=20, tbl_width_chars=200, float_precision=3):
            print(f"seed {seed}", pl.DataFrame(rows), sep="\n")
        names = ("A", "log l", "log g", "log t0", "K")
        print(
            "foretold, by parameter:",
            {name: round(float(value), 2) for name, value in zip(names, share, strict=True)},
            flush=True,
        )


if __name__ == "__main__":
    main()
