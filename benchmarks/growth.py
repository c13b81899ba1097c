"""How the cost of an exact sweep grows: with layers, batch, length and parts, beside the law that it should follow.

GPT-2 shapes of width 256 (vocabulary 5000), random weights, float32. Heads at all positions; for parts, neurons spread
evenly over the blocks (4 blocks, width 64, 2,500 neurons a block). Each point is the median of three (parts: of one), in turn over the points of its
axis; the law is scaled to the axis's last point.

Laws, in multiply-adds: a part in block l runs the L - l - 1 blocks behind it, so layers cost H * L * (L - 1) / 2 blocks, and each
the patched block's output projection and MLP; batch and parts are linear; of length n, a block costs
n * (12 width^2 + 2 n width).

    python benchmarks/growth.py [--out docs/growth.svg]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import altair as alt
import polars as pl
import torch
from replay import examples
from transformers import GPT2Config, GPT2LMHeadModel

from patchclamp.models.model import Model
from patchclamp.parts import gated

WIDTH, HEADS = 256, 4
AXES: dict[str, tuple[int, ...]] = {
    "layers": (4, 8, 16),
    "batch": (1, 4, 16, 64),
    "length": (16, 64, 128, 256, 512),
    "parts": (10, 100, 1000, 10000),
}


def shape(axis: str, size: int) -> tuple[int, int, int, int | None]:
    """Layers, batch, length and neurons of a point."""
    layers, batch, length, neurons = {"layers": size}.get(axis, 4), 8, 32, None
    if axis == "batch":
        batch = size
    if axis == "length":
        batch, length = 1, size
    if axis == "parts":
        batch, length, neurons = 1, 16, size
    return layers, batch, length, neurons


def law(axis: str, size: int) -> float:
    """Multiply-adds that the sweep should cost."""
    layers, batch, length, neurons = shape(axis, size)
    token = 12 * WIDTH**2 + 2 * length * WIDTH
    behind = 9 * WIDTH**2  # the patched block's MLP and output projection; the last block's at answers alone
    if neurons is not None:
        return neurons  # everything else is the same at each point
    return batch * length * HEADS * (layers * (layers - 1) / 2 * token + (layers - 1) * behind)


def sweep(axis: str, size: int) -> Callable[[], object]:
    """A function that measures one point's parts."""
    layers, rows, length, neurons = shape(axis, size)
    torch.manual_seed(0)
    width, inner = (WIDTH, 4 * WIDTH) if neurons is None else (64, 2500)
    config = GPT2Config(vocab_size=5000, n_layer=layers, n_head=HEADS, n_embd=width, n_inner=inner, attn_implementation="eager",
                        bos_token_id=1, eos_token_id=1)  # fmt: skip
    model = Model.load(GPT2LMHeadModel(config).eval())
    tokens = torch.randint(3, 5000, (2, rows, length))
    spread = range(0, 10000, 10000 // (neurons or 1))
    sites = ["L*.h*"] if neurons is None else [f"L{number // 2500}.mlp.n{number % 2500}" for number in spread]
    parts, batch = gated(model, sites), examples(tokens[0], tokens[1]).batch()
    rule = parts.fallback("resample")
    rule.at(batch)

    def run() -> None:
        for some in torch.arange(len(parts.labels)).split(500):
            gates = parts.open(len(some))
            gates[torch.arange(len(some)), :, :, some] = 0
            parts.measure(batch, gates, rule)

    return run


def draw(rows: list[dict[str, object]], out: Path) -> None:
    """The plot: a panel per axis, both scales logarithmic."""
    frame = pl.DataFrame(rows)
    base = alt.Chart(frame).encode(
        x=alt.X("size:Q", scale=alt.Scale(type="log"), title=None),
        y=alt.Y("seconds:Q", scale=alt.Scale(type="log"), title="seconds"),
    )
    lines = base.transform_filter("datum.what == 'law'").mark_line(color="#999", strokeDash=[4, 3])
    points = base.transform_filter("datum.what == 'measured'").mark_line(point=True, color="#2166ac")
    chart = alt.layer(lines, points).properties(width=170, height=150).facet(
        column=alt.Column("axis:N", sort=list(AXES), title="Exact sweep: measured (blue) and its law (dashed)")
    ).resolve_scale(x="independent", y="independent")  # fmt: skip
    chart.save(str(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/growth.svg"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--axes", default=",".join(AXES))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    print("| axis | size | seconds | law, scaled to the last point | measured / law |\n|---|---|---|---|---|")
    for axis in options.axes.split(","):
        runs = {size: sweep(axis, size) for size in AXES[axis]}
        seconds: dict[int, list[float]] = {size: [] for size in runs}
        once = axis == "parts"
        for repeat in range(1 if once else 4):
            for size, run in runs.items():
                start = time.perf_counter()
                run()
                if repeat or once:  # the first one warms up
                    seconds[size].append(time.perf_counter() - start)
        last = AXES[axis][-1]
        scale = statistics.median(seconds[last]) / law(axis, last)
        for size in runs:
            took, expected = statistics.median(seconds[size]), law(axis, size) * scale
            print(f"| {axis} | {size} | {took:.3f} | {expected:.3f} | {took / expected:.2f} |", flush=True)
            rows += [{"axis": axis, "size": size, "seconds": value, "what": what}
                     for what, value in (("measured", took), ("law", expected))]  # fmt: skip
    draw(rows, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
