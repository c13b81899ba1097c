"""Voids: layers that do next to nothing for a token, and skipping them (L2 adaptive computation, P260: arXiv 2505.14467)."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.gating.dynamic.sight import generated
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Inputs, Model
from patchclamp.models.recording import Recorder
from patchclamp.parts.gated import Gated, gated
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


def growth(model: Model, batch: Batch) -> Float[Tensor, "row position layer"]:
    """delta_l = |residual stream after layer l| - |before it| (L2 norms), at every token. One forward pass."""
    sites = [Site("resid.pre", layer) for layer in range(model.layers)] + [Site("resid.post", model.layers - 1)]
    recorder = Recorder(model.anatomy, sites)
    with torch.no_grad(), recorder.session().open():
        model.forward(batch.to(model.device), columns=torch.zeros(1, dtype=torch.long, device=model.device))
    norms = torch.stack([recorder.kept[site].float().norm(dim=-1) for site in sites], -1)
    return norms.diff(dim=-1)


def void(delta: Float[Tensor, "*token layer"], alpha: float) -> Bool[Tensor, "*token layer"]:
    """Which layers are void for a token: delta_l < alpha (max delta - min delta), over all layers of that token.

    Raises:
        GateError: alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise GateError(f"alpha={alpha} was asked: it is a share of the range, from 0 to 1")
    return delta < alpha * (delta.amax(-1, keepdim=True) - delta.amin(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class VoidMap:
    """Which layers are void, for which tokens.

    Args:
        table: a row per phase ("prompt", "generation") and layer: phase, layer, void (share of tokens), low, high (95 % interval
            over prompts), tokens.
        tokens: a row per token: row, position, phase, token (id), void (how many layers).
        void: [row, position, layer], as 0 and 1, NaN under padding.
        alpha: of the threshold.
    """

    table: pl.DataFrame
    tokens: pl.DataFrame
    void: Float[np.ndarray, "row position layer"]
    alpha: float


def void_map(model: Model, prompts: Inputs, alpha: float, *, max_new_tokens: int = 20) -> VoidMap:
    """Void layers per token, in the prompt and in what the model goes on to say (greedy), each token in the plain pass.

    Cost: generation, and one forward pass over prompts and continuations.
    """
    said = model.generate(prompts, max_new_tokens=max_new_tokens)
    whole = [[*prompt, *new] for prompt, new in zip(said.prompts, said.tokens, strict=True)]
    batch = token_batch(whole)
    width, mask = batch.tokens.shape[1], batch.mask
    delta = growth(model, batch)
    found = void(delta, alpha).double().cpu()
    behind = torch.tensor([[column >= width - len(new) for column in range(width)] for new in said.tokens])
    rows: list[dict[str, object]] = []
    for phase, here in (("prompt", mask & ~behind), ("generation", mask & behind)):
        per_row = (found * here[..., None]).sum(1) / here.sum(1, keepdim=True).clamp(min=1)
        some = here.any(1)
        for layer in range(model.layers if bool(some.any()) else 0):
            interval = mean_interval(per_row[some, layer].numpy())
            rows.append({"phase": phase, "layer": layer, "void": interval.mean, "low": interval.low, "high": interval.high,
                         "tokens": int(here.sum())})  # fmt: skip
    where = mask.nonzero().tolist()
    tokens = pl.DataFrame(
        {"row": [r for r, _ in where], "position": [c - (width - len(whole[r])) for r, c in where],
         "phase": ["generation" if behind[r, c] else "prompt" for r, c in where],
         "token": [whole[r][c - (width - len(whole[r]))] for r, c in where],
         "void": [int(found[r, c].sum()) for r, c in where]}
    )  # fmt: skip
    masked = np.where(mask[..., None].numpy(), found.numpy(), np.nan)
    return VoidMap(pl.DataFrame(rows, infer_schema_length=None), tokens, masked, alpha)


def skipping(model: Model) -> Gated:
    """What a layer adds, as parts: attention and MLP of each, to be closed on zero."""
    return gated(model, ["L*.attn.write", "L*.mlp.write"])


def skip_gates(parts: Gated, skip: Bool[Tensor, "row position layer"]) -> Float[Tensor, "1 row position part"]:
    """Gates that close attention and MLP of the layers that are skipped, token by token."""
    layers = [site.layer or 0 for site in parts.labels]
    return (~skip[..., layers]).float()[None]


def skip_curve(
    model: Model, examples: Examples, alphas: tuple[float, ...], *, metric: str = "kl", phase: str = "all", draws: int = 5,
    seed: int = 0,
) -> pl.DataFrame:  # fmt: skip
    """Quality where void layers are skipped, against as many random layers skipped at each token.

    Args:
        model: the model.
        examples: prompts with answers of one row each.
        alphas: of the threshold.
        metric: of quality (KL to the model itself, nats, by default).
        phase: "prompt", "generation" or "all": which tokens may skip.
        draws: random patterns.
        seed: of the patterns.

    Returns:
        A row per alpha and kind ("void", "random"): alpha, kind, skipped (share of layers), value (the metric) with low, high, n.

    Cost: per alpha, 1 + draws forward passes over the examples.

    Raises:
        GateError: a phase that is none, or examples with several rows each.
    """
    if phase not in ("prompt", "generation", "all"):
        raise GateError(f"there is no phase {phase!r}: choose prompt, generation or all")
    parts, chosen = skipping(model), metric_named(metric)
    zero, chance, groups = parts.fallback("zero"), torch.Generator().manual_seed(seed), groups_of(examples)
    found: dict[tuple[float, str], tuple[list[np.ndarray], list[float]]] = {}
    for batch in (one.to(model.device) for one in examples.batches(32)):
        if len(batch.tokens) != len(batch):
            raise GateError("layers are skipped token by token, and examples have several rows here: give single answers")
        delta, behind = growth(model, batch), generated(batch)
        may = batch.mask & {"all": torch.ones_like(behind), "prompt": ~behind, "generation": behind}[phase]
        for alpha in alphas:
            skip = void(delta, alpha) & may[..., None]
            orders = [torch.rand(skip.shape, generator=chance).to(skip.device).argsort(-1).argsort(-1) for _ in range(draws)]
            like = [(order < skip.sum(-1, keepdim=True)) for order in orders]
            gates = torch.cat([skip_gates(parts, one) for one in (skip, *like)])
            values = parts.measure(batch, gates, zero, chosen).double().cpu().numpy()
            share = float(skip.sum() / (batch.mask.sum() * model.layers))
            for kind, some in (("void", values[0]), ("random", values[1:].mean(0))):
                rows, shares = found.setdefault((alpha, kind), ([], []))
                rows.append(some)
                shares.append(share * len(batch))
    table: list[dict[str, object]] = []
    for (alpha, kind), (rows, shares) in found.items():
        interval = mean_interval(np.concatenate(rows), groups, seed=seed)
        table.append({"alpha": alpha, "kind": kind, "skipped": sum(shares) / len(examples), "value": interval.mean,
                      "low": interval.low, "high": interval.high, "n": interval.n})  # fmt: skip
    return pl.DataFrame(table, infer_schema_length=None)


def skip_live(model: Model, alpha: float) -> Edits:
    """Void layers skipped as the model runs, as edits for `run` and `generate` (`on="prompt"` or "generation" for one phase).

    A running pass does not know the layers to come: a layer is void if delta_l < alpha (max - min) over the layers so far, itself
    among them, a skipped one counting 0. The block runs, and what it would add is dropped for the token: attention and MLP closed on
    zero. Later tokens still attend to the token's keys and values of that layer, as they do where gates are closed.
    """
    void(torch.zeros(1, 1), alpha)  # alpha is checked before anything runs
    return {Site("resid.post", layer): Skip(layer, alpha) for layer in range(model.layers)}


@dataclass(frozen=True)
class Skip:
    """At a block's output: the block's input, for tokens for which the block is void."""

    layer: int
    alpha: float

    @property
    def reads(self) -> tuple[Site, ...]:
        """The streams before this block and those before it."""
        return tuple(Site("resid.pre", layer) for layer in range(self.layer + 1))

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        streams = [seen.values[site] for site in self.reads]
        delta = torch.stack([one.float().norm(dim=-1) for one in (*streams, value)], -1).diff(dim=-1)
        return torch.where(void(delta, self.alpha)[..., -1:], streams[-1], value)
