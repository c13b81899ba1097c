"""Why induction comes all at once: three nested logits, as a small differential equation, and as they are in a model.

An induction head is two attentions and a readout, each inside the next: the first layer looks at the token before with logit b1;
what it brings lets the second layer look, with logit b2, at labels of items like the query; what that finds is said with logit xi.

    p = e^b1 / (e^b1 + n),  q = (1 - p) / n                              the first layer: right token before, each of the n others
    m = B e^(b2 p) / (B e^(b2 p) + (M - B) e^(b2 q))                      the second: all on the query's own B labels, of M tokens
    loss = -log [ e^(xi m + w) / (e^(xi m + w) + c e^(xi B (1 - m) / (M - B)) + L - 1 - c) ]

with N item-label pairs, M = 2N tokens, n = N, every class in the context B times, c = N / B - 1 other classes in it, L labels;
w is what is known of the query's class by heart. No gradient reaches b1 before there is some b2, nor b2 before b1, nor either
before xi: they wait for one another, and then come at once.

Paper: Reddy 2023, The mechanistic basis of data dependence and abrupt learning in an in-context classification task,
https://arxiv.org/abs/2312.03002 (P182): the two-parameter induction head (b1, b2), the nested logits and the intrinsic curriculum
are the paper's. Ours: the mean-field form above (all other tokens alike), and memory as one number, b1' = -dloss/db1 and so on,
but w' = -(dloss/dw) / K, since each of K classes is trained on a K-th of the steps.
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.model import Inputs, Model
from patchclamp.units.heads import fitting, looks, repeated
from patchclamp.units.recall import half_of
from patchclamp.units.table import Numbers, pieces, recorded, tidy

State = Float[np.ndarray, " 4"]


@dataclass(frozen=True)
class Contexts:
    """What the toy learns from.

    Args:
        pairs: N, item-label pairs before the query.
        burst: B, how often each class in the context is there.
        labels: L, how many labels there are.
        classes: K, how many classes; infinity: nothing is learned by heart.
    """

    pairs: int = 8
    burst: int = 1
    labels: int = 32
    classes: int | float = math.inf

    def __post_init__(self) -> None:
        if self.burst < 1 or self.pairs % self.burst or self.labels < self.pairs // self.burst or self.classes < 1:
            raise MeasureError(
                f"{self.pairs} pairs, each class {self.burst} times, {self.labels} labels, {self.classes} classes: the pairs must be a "
                "multiple of the burst, and labels as many at least as classes in the context"
            )


def loss(state: State, contexts: Contexts) -> float:
    """The loss at (b1, b2, xi, w), in nats; log L at zero."""
    right, other, rest = _logits(state, contexts)[:3]
    return float(np.logaddexp(np.logaddexp(right, other), rest) - right)


def _logits(state: State, contexts: Contexts) -> tuple[float, float, float, float, float]:
    """The right label's logit; the log of what other classes in the context, and what all other labels add up to; m; p - q."""
    b1, b2, xi, w = map(float, state)
    n, own = contexts.pairs, contexts.burst
    tokens, others = 2 * contexts.pairs, contexts.pairs // contexts.burst - 1
    p = 1 / (1 + n * math.exp(-b1))
    apart = p - (1 - p) / n
    m = 1 / (1 + (tokens - own) / own * math.exp(-b2 * apart))
    right = xi * m + w
    other = xi * own * (1 - m) / (tokens - own) + _log(others)
    return right, other, _log(contexts.labels - 1 - others), m, apart


def _log(count: int) -> float:
    return math.log(count) if count > 0 else -math.inf


def slopes(state: State, contexts: Contexts) -> State:
    """d loss / d (b1, b2, xi, w), in closed form."""
    b1, b2, xi, _ = map(float, state)
    n, own, tokens = contexts.pairs, contexts.burst, 2 * contexts.pairs
    right, other, rest, m, apart = _logits(state, contexts)
    whole = np.logaddexp(np.logaddexp(right, other), rest)
    wrong, beside = 1 - math.exp(right - whole), math.exp(other - whole)
    spread = own / (tokens - own)
    gain = xi * wrong + xi * spread * beside  # -d loss / d m
    inner = m * (1 - m)
    p = 1 / (1 + n * math.exp(-b1))
    turn = p * (1 - p) * (1 + 1 / n)  # d (p - q) / d b1
    return np.array([-gain * inner * b2 * turn, -gain * inner * apart, -(m * wrong - spread * (1 - m) * beside), -wrong])


def pace(xi: float, w: float, contexts: Contexts) -> float:
    """How fast the induction head grows out of nothing: near b1 = b2 = 0, b1' = pace b2 and b2' = pace b1, so that b1 + b2 grows
    as e^(pace t). pace = -dloss/dm m (1 - m) / (n + 1), at m = B / M. Zero without a readout (xi = 0).
    """
    state = np.array([0.0, 0.0, xi, w])
    right, other, rest, m, _ = _logits(state, contexts)
    whole = np.logaddexp(np.logaddexp(right, other), rest)
    spread = contexts.burst / (2 * contexts.pairs - contexts.burst)
    gain = xi * (1 - math.exp(right - whole)) + xi * spread * math.exp(other - whole)
    return gain * m * (1 - m) / (contexts.pairs + 1)


def learned(contexts: Contexts, *, start: float = 0.01, horizon: float = 2000.0, points: int = 400) -> pl.DataFrame:
    """The toy over training: gradient flow from (start, start, start, 0).

    Returns:
        time, b1, b2, xi, w, loss, attention (m), `in_context` (probability of the right label for a class that is not known by
        heart: w = 0) and `in_weights` (for a class that is not in the context).
    """
    from scipy.integrate import solve_ivp

    weights = np.array([1.0, 1.0, 1.0, 1.0 / contexts.classes])
    times = np.linspace(0, horizon, points)
    begin = np.array([start, start, start, 0.0])
    flow = solve_ivp(
        lambda _, state: -weights * slopes(state, contexts),
        (0, horizon),
        begin,
        method="LSODA",
        t_eval=times,
        rtol=1e-8,
        atol=1e-10,
    )
    rows: list[dict[str, float]] = []
    for time, state in zip(flow.t, flow.y.T, strict=True):
        known = state * np.array([1, 1, 1, 0])
        w = float(state[3])
        rows.append({
            "time": float(time), **dict(zip(("b1", "b2", "xi", "w"), map(float, state), strict=True)), "loss": loss(state, contexts),
            "attention": _logits(state, contexts)[3], "in_context": math.exp(-loss(known, contexts)),
            "in_weights": 1 / (1 + (contexts.labels - 1) * math.exp(-w)),
        })  # fmt: skip
    return pl.DataFrame(rows)


def transition(table: pl.DataFrame, contexts: Contexts) -> float | None:
    """When the induction head comes: the first time that the second layer's attention is halfway from B / M to 1; None: it never does."""
    first = contexts.burst / (2 * contexts.pairs)
    there = table.filter(pl.col("attention") >= (1 + first) / 2)
    return None if there.is_empty() else float(there["time"][0])


# --- in a model


def three_logits(model: Model, inputs: Inputs | None = None, seed: int = 0) -> pl.DataFrame:
    """The three logits of a model, on rows that end in a list said twice.

    A logit is the log-odds against an average other: log mean exp(score at the targets) - log mean exp(score elsewhere); 0 where
    nothing is preferred. It is b1, b2 and xi m of the toy where others are alike.

    Args:
        model: any.
        inputs: rows that end in a list said twice; by default 32 rows of random tokens.
        seed: of the default rows and the intervals.

    Returns:
        part `Li.hj`: `previous` (attention logit of the token before), `induction` (of what followed the token's first time),
        over the second time; part "model": `answer` (output logit of the list's next token), and `previous` and `induction` of
        the heads that have most of it. Means over rows, with intervals.

    Cost: two forward passes (scores kept).
    """
    given = repeated(model, length=fitting(model), seed=seed) if inputs is None else inputs
    batch = model.batch(given)
    start, length = half_of(batch.tokens, ordered=True)
    found: dict[tuple[str, str], list[Tensor]] = {}
    for piece, values in recorded(model, batch, ["scores"]):
        where = looks(piece.tokens, piece.mask)
        for site, scores in values.items():
            for name in ("previous", "induction"):
                each = _odds(scores, where[name], piece.mask, start + length)
                for h in range(scores.shape[1]):
                    found.setdefault((f"L{site.layer}.h{h}", name), []).append(each[:, h].cpu())
    for piece in pieces(model, batch, batch.tokens.shape[1] * int(model.anatomy.config.vocab_size)):
        logits = model.run(piece)[:, start + length : -1].double()
        said = piece.tokens[:, start + length + 1 :, None]
        own = logits.gather(-1, said)[..., 0]
        rest = logits.scatter(-1, said, -torch.inf).logsumexp(-1) - math.log(logits.shape[-1] - 1)
        found.setdefault(("model", "answer"), []).append((own - rest).mean(1).cpu())
    numbers = {key: torch.cat(some).numpy() for key, some in found.items()}
    best: list[Numbers] = []
    for name in ("previous", "induction"):
        heads = [values for (_, kind), values in numbers.items() if kind == name]
        best.append(Numbers("model", name, max(heads, key=lambda values: float(np.nan_to_num(values, nan=-np.inf).mean()))))
    return tidy([*(Numbers(part, name, values) for (part, name), values in numbers.items()), *best], seed)


def _odds(scores: Tensor, target: Tensor, mask: Tensor, begin: int) -> Float[Tensor, "row head"]:
    """Log-odds of targets against an average other visible key, averaged over queries from `begin` on that have both."""
    seen = (mask[:, :, None] & mask[:, None, :]).tril()[:, None].expand_as(scores) & (scores > torch.finfo(scores.dtype).min / 4)
    target = target[:, None].expand_as(scores) & seen
    other = seen & ~target
    value = scores.double()

    def level(where: Tensor) -> Tensor:
        return value.masked_fill(~where, -torch.inf).logsumexp(-1) - where.sum(-1).double().log()

    asked = target.any(-1) & other.any(-1)
    asked[:, :, :begin] = False
    odds = torch.where(asked, level(target) - level(other), 0)
    return odds.sum(-1) / asked.sum(-1)
