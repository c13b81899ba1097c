"""What heads do: where they look (before, at duplicates, at what followed), what they copy; and learning in context.

Paper: Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895 (P045).
"""

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchclamp.errors import MeasureError
from patchclamp.models.editing import Edits
from patchclamp.models.model import Inputs, Model
from patchclamp.models.recording import head_writes
from patchclamp.models.scope import unobserved
from patchclamp.sites import Site
from patchclamp.tasks import induction
from patchclamp.tasks._tokens import Misfit, ids_of, special_prefix
from patchclamp.units.readout import straight
from patchclamp.units.table import Numbers, pieces, recorded, tidy

LENGTH = 25
LOOKS = ("previous", "duplicate", "induction", "current", "first")
_LEAK = 1e-3


def repeated(model: Model, n: int = 32, length: int = LENGTH, seed: int = 0) -> Int[Tensor, "row position"]:
    """Rows of random tokens said twice: special tokens that begin a text, then `length` different tokens, then the same again.

    Tokens are ordinary ones of the tokenizer; of a model without one, all ids but those that its config names as special.

    Raises:
        MeasureError: the vocabulary has no so many different tokens.
    """
    prefix, words = _vocabulary(model)
    if len(words) < length:
        raise MeasureError(f"{length} different tokens a row were asked for, and {model.name} has {len(words)}: ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.tensor(words)[torch.randperm(len(words), generator=generator)[:length]] for _ in range(n)]
    return torch.stack([torch.cat([torch.tensor(prefix, dtype=torch.long), draw, draw]) for draw in draws])


def looks(tokens: Int[Tensor, "row position"], mask: Bool[Tensor, "row position"]) -> dict[str, Bool[Tensor, "row query key"]]:
    """Where a head of each kind would look from every query, among real tokens:

    previous: key i - 1. duplicate: keys j < i that hold the query's token. induction: keys j < i behind such a token (what
    followed it). current: key i. first: the row's first token (from all queries but its own).
    """
    n = tokens.shape[1]
    i = torch.arange(n, device=tokens.device)[:, None]
    j = torch.arange(n, device=tokens.device)[None]
    real = mask[:, :, None] & mask[:, None, :]
    before = real & (j < i)
    duplicate = before & (tokens[:, :, None] == tokens[:, None, :])
    followed = torch.nn.functional.pad(duplicate[:, :, :-1], (1, 0)) & before
    begins = mask & (mask.long().cumsum(-1) == 1)
    return {
        "previous": before & (j == i - 1),
        "duplicate": duplicate,
        "induction": followed,
        "current": real & (j == i),
        "first": before & begins[:, None, :],
    }


def mass(pattern: Float[Tensor, "row head query key"], where: Bool[Tensor, "row query key"]) -> Float[Tensor, "row head"]:
    """Attention on `where`, averaged over the queries that have anywhere to look; NaN in rows that have none."""
    asked = where.any(-1)[:, None]
    found = (pattern.double() * where[:, None]).sum(-1)
    return torch.where(asked, found, 0).sum(-1) / asked.sum(-1)


def attention_scores(model: Model, inputs: Inputs) -> dict[str, Float[np.ndarray, "part example"]]:
    """Scores of all heads, per row of tokens; see `heads`."""
    found: dict[str, list[Tensor]] = {name: [] for name in LOOKS}
    for batch, values in recorded(model, inputs, ["pattern"]):
        where = looks(batch.tokens, batch.mask)
        for name in LOOKS:
            found[name].append(torch.cat([mass(pattern, where[name]) for pattern in values.values()], 1).T.cpu())
    return {name: torch.cat(some, 1).numpy() for name, some in found.items()}


def chance(model: Model, inputs: Inputs) -> dict[str, Float[np.ndarray, " example"]]:
    """The same scores of attention spread evenly over the query's real keys up to itself. No pass."""
    found: dict[str, list[Tensor]] = {name: [] for name in LOOKS}
    for batch in pieces(model, inputs, model.batch(inputs).tokens.shape[1] ** 2 * len(LOOKS)):
        seen = (batch.mask[:, :, None] & batch.mask[:, None, :]).tril().double()
        even = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        for name, where in looks(batch.tokens, batch.mask).items():
            found[name].append(mass(even[:, None], where)[:, 0].cpu())
    return {name: torch.cat(some).numpy() for name, some in found.items()}


def heads(model: Model, inputs: Inputs | None = None, seed: int = 0) -> pl.DataFrame:
    """Where each head looks, and what it copies.

    With A the head's attention on a row,

        score = mean over queries i that have anywhere to look of sum over those keys j of A[i, j]           in [0, 1]

    `previous`, `duplicate`, `induction` (the paper's prefix matching score), `current`, `first`: see `looks`. On random
    tokens said twice (`repeated`) no head can get induction by chance of words. `copying` and `raised`: see `copying`.

    Args:
        model: any.
        inputs: rows; by default 32 rows of 25 random tokens said twice (of fewer, where the model has fewer tokens or positions).
        seed: of the default rows.

    Returns:
        A row per head and score (part, name, value, low, high, n), intervals over rows; "model" has the `in_context` score
        of the default rows' second half against the first, and the scores of even attention as `chance.NAME`.

    Cost: one forward pass (patterns kept), and one unembedding per head and token.
    """
    length = fitting(model)
    given = inputs if inputs is not None else repeated(model, length=length, seed=seed)
    sites = [Site("head", layer, head) for layer, size in enumerate(model.anatomy.sizes) for head in range(size.heads)]
    parts = [str(site) for site in sites if not model.anatomy.why_not(Site("pattern", site.layer))]
    found = [
        Numbers(part, name, values[row])
        for name, values in (attention_scores(model, given) | copying(model, given)).items()
        for row, part in enumerate(parts)
    ]
    found += [Numbers("model", f"chance.{name}", values) for name, values in chance(model, given).items()]
    if isinstance(given, Tensor) and inputs is None:
        n = given.shape[1]
        found.append(
            Numbers("model", "in_context", in_context(model, given, (n - 2 * length + 1, n - length), (n - length + 1, n)))
        )
    return tidy(found, seed)


def fitting(model: Model, most: int = LENGTH) -> int:
    """How many tokens can be said twice: `most`, or as many as the vocabulary and the positions of the model allow."""
    prefix, words = _vocabulary(model)
    positions = getattr(model.anatomy.config, "max_position_embeddings", None) or 2 * most + len(prefix)
    return min(most, len(words), (positions - len(prefix)) // 2)


def _vocabulary(model: Model) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens that stand before a text, and ordinary tokens."""
    if model.tokenizer is None:
        config = model.anatomy.config
        special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        return (), tuple(token for token in range(config.vocab_size) if token not in special)
    words = induction.ordinary(model.tokenizer)
    text = str(model.tokenizer.decode([words[0]]))
    try:
        return special_prefix(model.tokenizer, text, ids_of(model.tokenizer, [text])[0], None), words
    except Misfit:
        return (), words


# --- copying: the output-value circuit


def copying(model: Model, inputs: Inputs) -> dict[str, Float[np.ndarray, "part example"]]:
    """Whether what a head takes from a token argues for that token: its output-value circuit, by itself.

    A head that looks at key j alone writes w_j = O v_j. Straight to the logits (the final norm linear, for its divisor is one
    positive number), that adds l_j = U N w_j. Of the token t_j that stands there,

        copying = share of other tokens of the vocabulary with l_j below l_j[t_j], ties half      chance .5; a copying head: 1
        raised  = (l_j[t_j] - mean l_j) / standard deviation of l_j over the vocabulary            0 for a head that writes nothing

    per row the mean over its real tokens (special ones at its beginning too). The paper's copying score adds up the logits
    that are raised at run time; rank and standard deviation are ours, since they do not depend on how much a head writes.

    Returns:
        By name, an array of heads (layer by layer) x rows.

    Cost: one forward pass, and an unembedding per head and token.

    Raises:
        MeasureError: a layer whose heads write something else than their pattern times their values (gated attention).
    """
    found: dict[str, list[Tensor]] = {"copying": [], "raised": []}
    with torch.no_grad(), unobserved():
        for batch, values in recorded(model, inputs, ["pattern", "v", "z", "attn"]):
            layers = [site.layer for site in values if site.kind == "pattern" and site.layer is not None]
            scores = [_copies(model, layer, values, batch.tokens) for layer in layers]
            real = batch.mask.double()
            for place, name in enumerate(found):
                each = torch.cat([score[place] for score in scores], 2).double()  # row, position, head
                found[name].append(((each * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)).T.cpu())
    return {name: torch.cat(some, 1).numpy() for name, some in found.items()}


def _copies(
    model: Model, layer: int, values: dict[Site, Tensor], tokens: Int[Tensor, "row position"]
) -> tuple[Float[Tensor, "row position head"], Float[Tensor, "row position head"]]:
    pattern, v, z = (values[Site(kind, layer)] for kind in ("pattern", "v", "z"))
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
    made = torch.einsum("rhij,rjhw->rihw", pattern.double(), v.double())
    if float((made - z).abs().max()) > _LEAK * float(z.abs().max()) + 1e-6 and z.dtype in (torch.float32, torch.float64):
        raise MeasureError(
            f"layer {layer} of {model.name} ({model.family.name}): what its heads write is not their pattern times their "
            "values (attention is gated behind it), so that they have no output-value circuit to score"
        )
    writes = head_writes(model.anatomy.layers[layer], v.to(z), values[Site("attn", layer)])
    said = tokens[:, :, None].expand(writes.shape[:-1])
    found, done = [], 0
    for logits in straight(model, writes.flatten(0, 2)):
        found.append(_judged(logits, said.flatten()[done : done + len(logits)]))
        done += len(logits)
    rank, raised = (torch.cat([one[place] for one in found]).unflatten(0, writes.shape[:-1]) for place in range(2))
    return rank, raised


def _judged(
    logits: Float[Tensor, "some token"], said: Int[Tensor, " some"]
) -> tuple[Float[Tensor, " some"], Float[Tensor, " some"]]:
    own = logits.gather(1, said[:, None])
    rank = ((logits < own).double().sum(1) + ((logits == own).double().sum(1) - 1) / 2) / (logits.shape[1] - 1)
    spread = logits.std(1, correction=0)
    silent = spread <= 1e-12
    return rank, torch.where(silent, 0, (own[:, 0] - logits.mean(1)) / torch.where(silent, 1, spread))


# --- learning in context


def losses(model: Model, inputs: Inputs, edits: Edits | None = None) -> Float[np.ndarray, "example position"]:
    """-log p of every token given those before it, in nats, by its place in its row; NaN at the first, and past the end.

    With edits, those of the edited model.

    Cost: one forward pass.
    """
    n = model.batch(inputs).tokens.shape[1]
    found: list[Tensor] = []
    for batch in pieces(model, inputs, n * int(model.anatomy.config.vocab_size)):
        logits = model.run(batch, edits)[:, :-1].float()
        each = cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none").double()
        each = torch.nn.functional.pad(each, (1, 0), value=torch.nan)
        known = batch.mask & (batch.mask.long().cumsum(-1) > 1)
        for row, keep in zip(each, known, strict=True):
            own = torch.full((n,), torch.nan, dtype=torch.double)
            own[1 : 1 + int(keep.sum())] = row[keep].cpu()
            found.append(own)
    return torch.stack(found).numpy()


def in_context(
    model: Model, inputs: Inputs, early: int | tuple[int, int] = 50, late: int | tuple[int, int] = 500
) -> Float[np.ndarray, " example"]:
    """In-context-learning score: loss late in the context minus loss early, in nats; below 0: the model uses its context.

    Args:
        model: any.
        inputs: texts or rows.
        early: the token predicted early (the paper's 50th), counted from 0 at the row's first; or a half-open range of them.
        late: the same, late (the paper's 500th).

    Returns:
        One number per row.

    Cost: one forward pass.

    Raises:
        MeasureError: rows are too short, or the first token is asked for, which nothing predicts.
    """
    each = losses(model, inputs)
    bounds = [(at, at + 1) if isinstance(at, int) else at for at in (early, late)]
    means: list[np.ndarray] = []
    for start, stop in bounds:
        asked = each[:, max(start, 0) : stop]
        if not 1 <= start < stop or asked.shape[1] < stop - start or np.isnan(asked).any():
            shortest = int((~np.isnan(each)).sum(1).min()) + 1
            raise MeasureError(
                f"the loss of tokens {start} to {stop - 1} was asked for, and the shortest row has {shortest} tokens, of which the "
                "first is not predicted: give longer rows, or other places (early=, late=)"
            )
        means.append(asked.mean(1))
    return means[1] - means[0]
