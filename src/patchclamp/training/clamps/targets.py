"""Ideal attention patterns: where a head of a known kind attends, by query."""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

TARGETS: tuple[str, ...] = ("previous", "induction", "match", "first", "self", "uniform")
RELATIONS: tuple[str, ...] = ("previous", "induction", "first", "self")
"""Those that name one position."""


def keys(name: str, tokens: Int[Tensor, "row position"], real: Bool[Tensor, "row position"]) -> Int[Tensor, "row position"]:
    """By query, the one position that a relation names among real tokens; -1 where there is none (induction).

    Args:
        name: previous (the first real token: itself), first, self, or induction (behind the last earlier occurrence of the
            query's token).
        tokens: ids.
        real: tokens that are no padding; padding attends to itself.
    """
    here = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    start = real.long().argmax(1, keepdim=True)
    if name == "induction":
        found = successors(tokens, real)
    else:
        found = {"previous": torch.maximum(here - 1, start), "first": start.expand(tokens.shape), "self": here}[name]
    return torch.where(real, found, here)


def successors(tokens: Int[Tensor, "row position"], real: Bool[Tensor, "row position"]) -> Int[Tensor, "row position"]:
    """By query i, the position after the last earlier occurrence of token i; -1 where there is none."""
    length = tokens.shape[1]
    behind = torch.arange(1, length + 1, dtype=torch.int32, device=tokens.device)
    earlier = torch.where(behind[None] < behind[:, None], behind, 0)  # [query, key]: 1 + the key, where it is earlier
    same = (tokens[:, :, None] == tokens[:, None]) & real[:, None]
    last = (same * earlier).amax(-1).long()  # 1 + the occurrence: the position after it
    return torch.where(last > 0, last, -1)


def similar(
    tokens: Int[Tensor, "row position"],
    real: Bool[Tensor, "row position"],
    embedding: Float[Tensor, "token width"],
    temperature: float,
) -> Float[Tensor, "row query key"]:
    """A soft induction pattern: on the positions after tokens like the present one, as near as their embeddings are.

        target[i, j] = softmax over j <= i, j behind a real token, of  cos(e(x_i), e(x_(j-1))) / temperature

    The first real query (and padding) attends to itself. Temperature 0 shares the weight among the most similar ones.
    Embeddings are constants here.
    """
    length = tokens.shape[1]
    with torch.no_grad():
        unit = normalize(embedding[tokens].float(), dim=-1)
        scores = torch.full((len(tokens), length, length), -torch.inf, device=tokens.device)
        scores[:, :, 1:] = (unit @ unit.transpose(1, 2))[:, :, :-1]
    behind = torch.zeros_like(real)
    behind[:, 1:] = real[:, :-1] & real[:, 1:]
    seen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril() & behind[:, None]
    alone = ~(seen.any(-1) & real)
    scores = scores.masked_fill(~seen | alone[..., None], -torch.inf)
    scores = torch.where(alone[..., None] & torch.eye(length, dtype=torch.bool, device=tokens.device), 0.0, scores)
    if temperature == 0:
        best = scores >= scores.amax(-1, keepdim=True) - 1e-6
        return best / best.sum(-1, keepdim=True)
    return torch.softmax(scores / temperature, -1)


def uniform(real: Bool[Tensor, "row position"], causal: bool) -> Float[Tensor, "row query key"]:
    """The same on all real tokens that a query sees; padding attends to itself."""
    length = real.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=real.device)
    seen = (seen.tril() if causal else seen) & real[:, None]
    alone = torch.eye(length, dtype=torch.bool, device=real.device)
    seen = torch.where(real[..., None], seen, alone).float()
    return seen / seen.sum(-1, keepdim=True)


def pattern(
    name: str, tokens: Int[Tensor, "row position"], real: Bool[Tensor, "row position"], causal: bool
) -> Float[Tensor, "#row query key"]:
    """A target that knows nothing but tokens; where induction has no place to name, on the first real token."""
    if name in ("previous", "first", "self", "uniform") and bool(real.all()):
        return _unpadded(name, tokens.shape[1], causal, tokens.device)
    if name == "uniform":
        return uniform(real, causal)
    at = keys(name, tokens, real)
    return one(torch.where(at >= 0, at, keys("first", tokens, real))).float()


def one(at: Int[Tensor, "row position"]) -> Bool[Tensor, "row position key"]:
    """True at the key that each query names; nowhere for -1."""
    return at[..., None] == torch.arange(at.shape[1], device=at.device)


def hits(
    name: str, tokens: Int[Tensor, "row position"], real: Bool[Tensor, "row position"], causal: bool
) -> Bool[Tensor, "#row query key"]:
    """The key that a relation names, for queries that see another one besides; padding names none."""
    if name != "induction" and bool(real.all()):
        return _unpadded_hits(name, tokens.shape[1], causal, tokens.device)
    found = one(keys(name, tokens, real)) & real[..., None]
    if causal:  # the first real token sees itself alone
        found = found & (keys("first", tokens, real) != keys("self", tokens, real))[..., None]
    return found


@lru_cache(maxsize=64)
def _unpadded_hits(name: str, length: int, causal: bool, device: torch.device) -> Bool[Tensor, "1 query key"]:
    real = torch.ones(1, length, dtype=torch.bool, device=device)
    found = one(keys(name, real.long(), real))
    return found & (torch.arange(length, device=device) > 0)[:, None] if causal else found


@lru_cache(maxsize=64)
def _unpadded(name: str, length: int, causal: bool, device: torch.device) -> Float[Tensor, "1 query key"]:
    """Targets that do not depend on tokens, made once."""
    real = torch.ones(1, length, dtype=torch.bool, device=device)
    if name == "uniform":
        return uniform(real, causal)
    return one(keys(name, real.long(), real)).float()
