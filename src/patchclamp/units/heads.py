"""What heads look at: the token before, duplicates, what followed them; one table with what they copy and what context gives.

Paper: Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895 (P045).
"""

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.model import Inputs, Model
from patchclamp.sites import Site
from patchclamp.tasks import induction
from patchclamp.tasks._tokens import Misfit, ids_of, special_prefix
from patchclamp.units.context import in_context
from patchclamp.units.copying import copying
from patchclamp.units.table import Numbers, pieces, recorded, tidy

LENGTH = 25
LOOKS = ("previous", "duplicate", "induction", "current", "first")


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


def unrepeated(model: Model, n: int = 32, length: int = LENGTH, seed: int = 0) -> Int[Tensor, "row position"]:
    """Rows like `repeated`, but the second list is another: drawn anew. What looks back as far here does so whatever stands there."""
    first, second = repeated(model, n, length, seed), repeated(model, n, length, seed + 1_000_003)
    return torch.cat([first[:, :-length], second[:, -length:]], 1)


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


def distance_scores(model: Model, rows: Int[Tensor, "row position"], length: int) -> Float[np.ndarray, "part example"]:
    """Attention of each head from the last `length` tokens to the token `length` - 1 before each: where induction would look, if the
    list had been said before.

    Cost: one forward pass.
    """
    n = rows.shape[1]
    where = torch.zeros(len(rows), n, n, dtype=torch.bool, device=model.device)
    queries = torch.arange(n - length, n)
    where[:, queries, queries - length + 1] = True
    found: list[Tensor] = []
    for batch, values in recorded(model, rows, ["pattern"]):
        found.append(torch.cat([mass(pattern, where[: len(batch.tokens)]) for pattern in values.values()], 1).T.cpu())
    return torch.cat(found, 1).numpy()


def heads(model: Model, inputs: Inputs | None = None, seed: int = 0, *, length: int | None = None) -> pl.DataFrame:
    """Where each head looks, and what it copies.

    With A the head's attention on a row,

        score = mean over queries i that have anywhere to look of sum over those keys j of A[i, j]           in [0, 1]

    `previous`, `duplicate`, `induction` (the paper's prefix matching score), `current`, `first`: see `looks`. On random
    tokens said twice (`repeated`) no head can get induction by chance of words, but one can get it by looking back so far
    whatever stands there: then it has as much of `distance`, its attention at the same places in lists that are not said twice.
    `copying` and `raised`: see `copying`.

    Args:
        model: any.
        inputs: rows; by default 32 rows of 25 random tokens said twice (of fewer, where the model has fewer tokens or positions).
        seed: of the default rows.
        length: of the default rows' lists.

    Returns:
        A row per head and score (part, name, value, low, high, n), intervals over rows; "model" has the scores of even attention
        as `chance.NAME`. On the default rows, also `distance`, and of "model" the `in_context` score of the second time against
        the first.

    Cost: one forward pass (patterns kept), and one unembedding per head and token; with the default rows, three passes.
    """
    length = fitting(model) if length is None else length
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
        distance = distance_scores(model, unrepeated(model, length=length, seed=seed), length)
        found += [Numbers(part, "distance", distance[row]) for row, part in enumerate(parts)]
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
