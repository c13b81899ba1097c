"""Weights by their singular values, representations by their rank, and how far layers move between two checkpoints.

Papers: The Condition Number as a Scale-Invariant Proxy for Information Encoding in Neural Units, https://arxiv.org/abs/2506.16289
(P226: which tensors to fine-tune); Ardakani et al. 2023, SlimFit, https://arxiv.org/abs/2305.18513 (P246: which layers to freeze);
Liu et al. 2023, How connectivity structure shapes rich and lazy learning in neural circuits, https://arxiv.org/abs/2310.08513 (P224).
"""

from collections.abc import Iterator, Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.model import Inputs, Model
from patchclamp.units.table import exactly, recorded

CONDITION = "condition"


def ranks(singular: Float[Tensor, " value"]) -> dict[str, float]:
    """Numbers of singular values s, largest first, all positive:

    condition = s_1 / s_last (infinite where that is 0), effective_rank = exp(entropy of s / sum s), stable_rank = sum s^2 / s_1^2,
    participation = (sum s^2)^2 / sum s^4. Of n equal values: 1, n, n, n. Of one value and zeros: inf, 1, 1, 1.
    """
    s = singular.double()
    if float(s[0]) == 0:
        return {CONDITION: float("nan"), "effective_rank": 0.0, "stable_rank": 0.0, "participation": 0.0}
    share, square = s / s.sum(), (s / s[0]).square()
    last = float(s[-1])
    return {
        CONDITION: float(s[0]) / last if last > 0 else float("inf"),
        "effective_rank": float(torch.exp(torch.special.entr(share).sum())),
        "stable_rank": float(square.sum()),
        "participation": float(square.sum() ** 2 / square.square().sum()),
    }


def matrices(model: Model) -> Iterator[tuple[str, Float[Tensor, "row column"]]]:
    """Every weight of two axes by its name, tied ones once; of fused experts, each expert's (`name[3]`)."""
    for name, weight in model.hf.named_parameters():
        value = weight.detach()
        if value.dim() == 2:
            yield name, value
        elif value.dim() == 3:
            yield from ((f"{name}[{i}]", one) for i, one in enumerate(value))


def condition(model: Model, inputs: Inputs | None = None) -> pl.DataFrame:
    """Singular values of weights, and of what the residual stream holds.

    Args:
        model: any.
        inputs: rows for the stream; None: of the weights alone.

    Returns:
        part: a weight's name; `condition`, `effective_rank`, `stable_rank`, `participation` (see `ranks`).
        part `Li.resid.post` and embed, where rows are given: the same but condition, of the matrix tokens x width less its mean.
        No intervals.

    Cost: a singular value decomposition of every weight; with rows, one forward pass and a product width x width per layer.

    Raises:
        MeasureError: fewer than 2 real tokens.
    """
    found: list[tuple[str, str, float]] = []
    for name, weight in matrices(model):
        values = torch.linalg.svdvals(weight.float() if weight.dtype != torch.float64 else weight)
        found += [(name, kind, value) for kind, value in ranks(values).items()]
    for part, values in ({} if inputs is None else _spectra(model, inputs)).items():
        found += [(part, kind, value) for kind, value in ranks(values).items() if kind != CONDITION]
    return exactly(found)


def _spectra(model: Model, inputs: Inputs) -> dict[str, Float[Tensor, " value"]]:
    """Singular values of the centred stream, layer by layer, from its covariance."""
    products: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count = 0
    for batch, values in recorded(model, inputs, ["embed", "resid.post"]):
        count += int(batch.mask.sum())
        for site, value in values.items():
            x = value[batch.mask].double()
            products[str(site)] = products.get(str(site), torch.zeros((), device=x.device)) + x.T @ x
            sums[str(site)] = sums.get(str(site), torch.zeros((), device=x.device)) + x.sum(0)
    if count < 2:
        raise MeasureError(f"the rank of the stream was asked for, from {count} tokens: give longer rows, or more")
    return {
        part: torch.linalg.eigvalsh(product - torch.outer(sums[part], sums[part]) / count).flip(0).clamp(min=0).sqrt().cpu()
        for part, product in products.items()
    }


def chosen(table: pl.DataFrame, count: int, *, lowest: bool = True) -> tuple[str, ...]:
    """Weights to fine-tune: those of lowest condition number, which encode least, so that least is forgotten (or the highest).

    Args:
        table: of `condition`.
        count: how many.
        lowest: False for the others' end, as a control.

    Raises:
        MeasureError: there are not so many.
    """
    known = (
        table.filter(pl.col("name") == CONDITION).drop_nulls("value").sort("value", descending=not lowest, maintain_order=True)
    )
    if not 1 <= count <= len(known):
        raise MeasureError(f"{count} weights were asked for, and the table has {len(known)} with a condition number")
    return tuple(known["part"][:count])


def changes(before: Model, after: Model) -> pl.DataFrame:
    """How far weights have moved between two checkpoints of one model.

    relative = sum |after - before| / sum |before|                       over a weight's entries, or all those of a layer

    Returns:
        part: a weight's name, `Li` (all weights of a block), "model"; name `relative`. No intervals.

    Raises:
        MeasureError: they are not checkpoints of one model.
    """
    old, new = dict(before.hf.named_parameters()), dict(after.hf.named_parameters())
    if old.keys() != new.keys() or any(old[name].shape != new[name].shape for name in old):
        raise MeasureError(f"{before.name} and {after.name} have other weights: give two checkpoints of one model")
    moved = {name: (float((new[name].detach().cpu() - old[name].detach().cpu()).double().abs().sum()),
                    float(old[name].detach().double().abs().sum())) for name in old}  # fmt: skip
    blocks: dict[str, list[str]] = {"model": list(old)}
    for number, layer in enumerate(before.anatomy.layers):
        own = {id(weight) for weight in layer.block.parameters()}
        blocks[f"L{number}"] = [name for name, weight in old.items() if id(weight) in own]
    blocks |= {name: [name] for name in old}
    found = [(part, [sum(moved[name][side] for name in names) for side in range(2)]) for part, names in blocks.items()]
    return exactly([(part, "relative", far / size if size > 0 else float("nan")) for part, (far, size) in found])


def frozen(tables: Sequence[pl.DataFrame], share: float) -> tuple[int, ...]:
    """Layers to freeze: those that moved least, on average over tables of `changes`; `share` of all layers, rounded down.

    Raises:
        MeasureError: no tables, or a share that is not between 0 and 1.
    """
    if not tables or not 0 <= share <= 1:
        raise MeasureError(
            f"a share of {share:g} of the layers of {len(tables)} tables was to be frozen: give tables, and 0 to 1"
        )
    layers = pl.concat(tables).filter(pl.col("part").str.contains(r"^L\d+$"))
    mean = layers.group_by("part").agg(pl.col("value").mean()).with_columns(number=pl.col("part").str.slice(1).cast(pl.Int64))
    least = mean.sort("value", "number")["number"].to_list()
    return tuple(sorted(least[: int(share * len(least))]))
