"""Modular addition in the Fourier basis: key frequencies, restricted and excluded loss.

Of a model that adds two numbers modulo p, all p^2 inputs are run. With L[a, b, c] the logit of answer c, the part of L that
depends on (a + b) mod p with frequency k,

    C_k[a, b, c] = projection of L[., ., c] onto span(cos(2 pi k (a + b) / p), sin(2 pi k (a + b) / p))

is what the trigonometric algorithm makes; C_0 is the mean over inputs. Projections are orthogonal, and exact:

    restricted logits = C_0 + sum over key k of C_k            what is left when only the algorithm is kept
    excluded logits   = L - sum over key k of C_k              what is left when it is taken out (what was memorised)

Paper: Nanda et al. 2023, Progress measures for grokking via mechanistic interpretability, https://arxiv.org/abs/2301.05217 (P123).
"""

from collections.abc import Sequence
from typing import Literal

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.model import Inputs, Model
from patchclamp.models.scope import unobserved
from patchclamp.units.readout import straight
from patchclamp.units.table import exactly, pieces

LARGEST = 400
"""The largest modulus that is taken from the vocabulary: all p^2 inputs are run."""
ABOVE = 2.0
"""A frequency is key that has more than so many times an even share of the power."""


def component(logits: Float[Tensor, "a b answer"], frequencies: Sequence[int]) -> Float[Tensor, "a b answer"]:
    """The part of logits that depends on (a + b) mod p with these frequencies (0: the mean over inputs). An orthogonal projection.

    Exact: a function of a + b is projected as the mean over pairs of one sum is, and that is a Fourier transform of p values.
    """
    p = len(logits)
    total = _sums(p, logits.device)
    means = torch.zeros(p, logits.shape[2], dtype=torch.double, device=logits.device)
    means.index_add_(0, total.flatten(), logits.double().flatten(0, 1))
    waves = torch.fft.rfft(means / p, dim=0)
    keep = torch.zeros(len(waves), dtype=torch.bool, device=waves.device)
    keep[[_known(k, p) for k in frequencies]] = True
    return torch.fft.irfft(waves * keep[:, None], n=p, dim=0)[total]


def restricted(logits: Float[Tensor, "a b answer"], keys: Sequence[int]) -> Float[Tensor, "a b answer"]:
    """Logits of which only the mean over inputs and the key frequencies of a + b are kept."""
    return component(logits, [0, *keys])


def excluded(logits: Float[Tensor, "a b answer"], keys: Sequence[int]) -> Float[Tensor, "a b answer"]:
    """Logits without the key frequencies of a + b."""
    return logits.double() - component(logits, keys)


def losses(logits: Float[Tensor, "a b answer"]) -> Float[Tensor, "a b"]:
    """-log p of (a + b) mod p among the p numbers, in nats, of every input."""
    answer = _sums(len(logits), logits.device)
    return -logits.double().log_softmax(-1).gather(-1, answer[..., None])[..., 0]


def power(values: Float[Tensor, "number width"]) -> Float[Tensor, " frequency"]:
    """Squared norm of each frequency's Fourier components of a map of the numbers mod p (an embedding, a neuron-logit map).

    In the orthonormal basis of Z_p; frequencies 1 to p // 2 (the constant is left out). They sum to the squared norm of the
    values less their mean.
    """
    p = len(values)
    waves = torch.fft.rfft(values.double(), dim=0, norm="ortho").abs().square().sum(1)
    twice = torch.full_like(waves, 2.0)
    if p % 2 == 0:
        twice[-1] = 1.0  # it is its own mirror image
    return (waves * twice)[1:]


def power_of_sums(logits: Float[Tensor, "a b answer"]) -> Float[Tensor, " frequency"]:
    """Squared norm of C_k over all inputs and answers, by frequency k = 1 to p // 2."""
    p = len(logits)
    means = torch.zeros(p, logits.shape[2], dtype=torch.double, device=logits.device)
    means.index_add_(0, _sums(p, logits.device).flatten(), logits.double().flatten(0, 1) / p)
    return power(means) * p


def keys_of(found: Float[Tensor, " frequency"], above: int | float = ABOVE) -> tuple[int, ...]:
    """Key frequencies: those with more than `above` times an even share of the power. May be none: nothing stands out."""
    even = float(found.sum()) / len(found)
    return tuple(int(k) + 1 for k in (found > above * even).nonzero()[:, 0])


def gini(found: Float[Tensor, " frequency"]) -> float:
    """Gini coefficient of non-negative numbers: sum |x_i - x_j| / (2 n sum x). 0: all alike; (n - 1) / n: one has everything."""
    total = float(found.sum())
    return float((found[:, None] - found[None]).abs().sum()) / (2 * len(found) * total) if total > 0 else 0.0


def embedded(model: Model, p: int) -> Float[Tensor, "number width"]:
    """The embeddings of the numbers: rows 0 to p - 1."""
    return model.hf.get_input_embeddings().weight.detach()[:p]


def neuron_logits(model: Model, p: int) -> Float[Tensor, "answer neuron"]:
    """The last MLP's neuron-logit map: what each neuron adds to the logit of each number, straight through the final norm.

    Raises:
        MeasureError: the last layer has no neurons that can be told apart (experts).
    """
    down = model.anatomy.layers[-1].down
    count = model.anatomy.sizes[-1].neurons
    if down is None or count is None:
        raise MeasureError(f"the last layer of {model.name} ({model.family.name}) keeps its neurons inside experts")
    with torch.no_grad(), unobserved():
        weight = next(down.parameters())
        each = torch.eye(count, dtype=weight.dtype, device=weight.device)[None]
        writes = (down(each) - down(torch.zeros_like(each)))[0]
    return torch.cat(list(straight(model, writes)))[:, :p].T


def logits_of(model: Model, p: int, equals: int | None = None) -> Float[Tensor, "a b answer"]:
    """Logits of the numbers behind every input "a b =": the numbers are tokens 0 to p - 1.

    Args:
        model: any.
        p: the modulus.
        equals: the token behind the two numbers; by default p. -1: none, the answer follows b.

    Cost: p^2 rows of three tokens.
    """
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    end = p if equals is None else equals
    rows = torch.stack([a.flatten(), b.flatten(), *([torch.full((p * p,), end)] if end >= 0 else [])], 1)
    found = [
        model.run(batch)[:, -1, :p].double().cpu() for batch in pieces(model, rows, 3 * int(model.anatomy.config.vocab_size))
    ]
    return torch.cat(found).unflatten(0, (p, p))


def fourier(
    model: Model,
    inputs: Inputs | None = None,
    *,
    p: int | None = None,
    keys: Sequence[int] | None = None,
    by: Literal["logits", "embed", "neurons"] = "logits",
    above: int | float = ABOVE,
) -> pl.DataFrame:
    """Progress measures of a model of modular addition.

    Args:
        model: of the sum of two numbers, tokens 0 to p - 1, said as "a b =", the answer after that.
        inputs: the rows it is trained on, [a, b, =] or [a, b, =, c]: they tell the training from the test set.
        p: the modulus; by default the token "=" (of rows), or the vocabulary's last token.
        keys: key frequencies; give those of the last checkpoint to all checkpoints of a run. By default those of this model
            that have more than `above` times an even share of the power
        by: of the logits over a + b, of the embedding, or of the last MLP's neuron-logit map (the paper's).
        above: see `keys_of`.

    Returns:
        part "model": `loss`, `restricted`, `excluded` over all inputs, and with rows `train.` and `test.` each (the paper's
        excluded loss is `train.excluded`); `accuracy`; `explained` (share of the logits' variance over inputs that the key
        frequencies carry); `keys` (how many). Parts "embed", "logits" and "neurons": `gini` over the norms of their
        frequencies, and `frequency.K`, each one's share of the power. No intervals: all inputs there are were run. A model
        whose last layer has experts gets no "neurons".

    Cost: p^2 rows of three tokens.

    Raises:
        MeasureError: rows of another form, a frequency that is none, experts where neurons were
            asked for, or no rows and a vocabulary of hundreds of tokens.
    """
    rows = None if inputs is None else model.batch(inputs).tokens
    modulus, equals = _modulus(model, rows, p)
    logits = logits_of(model, modulus, equals)
    spectrum = power_of_sums(logits)
    spectra = {"embed": power(embedded(model, modulus).cpu()), "logits": spectrum}
    if by == "neurons" or model.anatomy.layers[-1].down is not None:
        spectra["neurons"] = power(neuron_logits(model, modulus).cpu())
    chosen = keys_of(spectra[by], above) if keys is None else [_known(k, modulus) for k in keys]
    sets = {"": torch.ones(modulus, modulus, dtype=torch.bool)}
    if rows is not None:
        seen = torch.zeros(modulus, modulus, dtype=torch.bool)
        seen[rows[:, 0].cpu(), rows[:, 1].cpu()] = True
        sets |= {"train.": seen, "test.": ~seen}
    found: list[tuple[str, str, float]] = []
    for name, values in (("loss", logits), ("restricted", restricted(logits, chosen)), ("excluded", excluded(logits, chosen))):
        each = losses(values)
        found += [("model", f"{kind}{name}", float(each[which].mean())) for kind, which in sets.items() if bool(which.any())]
    varying = logits - component(logits, [0])
    right = logits.argmax(-1) == _sums(modulus, logits.device)
    found += [
        *(("model", f"{kind}accuracy", float(right[which].double().mean())) for kind, which in sets.items() if bool(which.any())),
        ("model", "explained", float(component(logits, chosen).square().sum() / varying.square().sum().clamp(min=1e-300))),
        ("model", "keys", float(len(chosen))),
    ]
    for part, one in spectra.items():
        found.append((part, "gini", gini(one.sqrt())))
        found += [(part, f"frequency.{k + 1}", float(value)) for k, value in enumerate(one / one.sum().clamp(min=1e-300))]
    return exactly(found, modulus * modulus)


def _modulus(model: Model, rows: Int[Tensor, "row position"] | None, p: int | None) -> tuple[int, int]:
    if rows is None:
        modulus = int(model.anatomy.config.vocab_size) - 1 if p is None else p
        if p is None and modulus > LARGEST:
            raise MeasureError(
                f"{model.name} has {modulus + 1} tokens, so that it hardly adds modulo {modulus}: give rows of its training, or p="
            )
        return modulus, modulus
    ends = rows[:, 2].unique() if rows.shape[1] in (3, 4) else rows[:0, 0]
    modulus = int(ends[0]) if p is None and len(ends) else p or 0
    if len(ends) != 1 or modulus < 2 or bool((rows[:, :2] >= modulus).any()):
        raise MeasureError(
            f"rows of modular addition are [a, b, =] or [a, b, =, c], numbers 0 to p - 1 and one token for =; these are "
            f"{tuple(rows.shape)}, with {len(ends)} tokens in the place of = and numbers up to {int(rows[:, :2].max())}: give such "
            "rows, and p= where = is not token p"
        )
    return modulus, int(ends[0])


def _sums(p: int, device: torch.device) -> Int[Tensor, "a b"]:
    number = torch.arange(p, device=device)
    return (number[:, None] + number[None]) % p


def _known(k: int, p: int) -> int:
    if not 0 <= k <= p // 2:
        raise MeasureError(f"frequency {k} was asked for, and numbers modulo {p} have frequencies 0 to {p // 2}")
    return k
