"""The board in a model's residual stream: read by linear maps, and changed along them (Li et al. 2022, Nanda et al. 2023).

A reader has for each square and each of three states (mine, yours, empty, as the player to move has it) a direction and an offset;
the state with the highest reading is what it says. It is fitted by least squares to ones and zeros, in closed form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.models.editing import Edits, Seen
from patchclamp.sites import Site
from patchclamp.zoo.recipes._board import BITS, SIDE, squares
from patchclamp.zoo.recipes._recipe import drawing
from patchclamp.zoo.recipes.backcopy import At

if TYPE_CHECKING:
    from patchclamp.models.model import Model

STATES = ("mine", "yours", "empty")
RIDGE = 1e-3
"""Of least squares, times the mean square of what it is fitted to: for directions that hardly vary."""
Way = Literal["reads", "writes", "other", "random"]
"""What is added to turn a disc: along which the square is read; what the square's disc adds; another square's; anything."""


def states(mine: Int[Tensor, "*board"], yours: Int[Tensor, "*board"]) -> Int[Tensor, "*board square"]:
    """0, 1 or 2 for each square: mine, yours, empty."""
    return torch.where(squares(mine), 0, torch.where(squares(yours), 1, 2))


def fit(given: Float[Tensor, "row feature"], wanted: Float[Tensor, "row value"]) -> Float[Tensor, "one_more value"]:
    """Least squares with an offset (the last row), a little of a ridge on all but that; float64."""
    x = torch.cat([given.double(), torch.ones(len(given), 1, dtype=torch.float64)], 1)
    shrink = torch.full((x.shape[1],), RIDGE * float(given.double().square().mean()) * len(x), dtype=torch.float64)
    shrink[-1] = 0
    return torch.linalg.solve(x.T @ x + shrink.diag(), x.T @ wanted.double())


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear map from the residual stream to readings of each square's states.

    Args:
        reads: direction of each square's state.
        offset: added to it.
        writes: what a disc of mine on a square adds to the stream, all other squares and the place alike, and one of yours takes
            away (the fit the other way round: of the stream, to all squares and the place).
    """

    reads: Float[Tensor, "width square state"]
    offset: Float[Tensor, "square state"]
    writes: Float[Tensor, "square width"]

    def says(self, stream: Float[Tensor, "*row width"]) -> Int[Tensor, "*row square"]:
        """The state with the highest reading."""
        return (torch.einsum("...w,wst->...st", stream, self.reads) + self.offset).argmax(-1)

    def owner(self, stream: Float[Tensor, "*row width"]) -> Bool[Tensor, "*row square"]:
        """Whether a disc there would be mine, not yours: the higher of two readings."""
        found = torch.einsum("...w,wst->...st", stream, self.reads[..., :2]) + self.offset[:, :2]
        return found[..., 0] > found[..., 1]


def reader(stream: Float[Tensor, "row width"], board: Int[Tensor, "row square"], place: Int[Tensor, " row"]) -> Reader:
    """Fitted to boards; cost: two solutions of systems of `width` and of about 100 unknowns."""
    ones = torch.nn.functional.one_hot(board, len(STATES)).float()
    found = fit(stream, ones.flatten(1))
    disc, empty = ones[..., 0] - ones[..., 1], ones[..., 2]
    back = fit(torch.cat([disc, empty, torch.nn.functional.one_hot(place).float()], 1), stream)
    return Reader(
        found[:-1].unflatten(1, (SIDE**2, len(STATES))).float(),
        found[-1].unflatten(0, (SIDE**2, len(STATES))).float(),
        back[: SIDE**2].float(),
    )


def right(reader: Reader, stream: Float[Tensor, "row width"], board: Int[Tensor, "row square"]) -> dict[str, float]:
    """Share of squares whose state is read right (`board`), and of discs whose owner is (`discs`)."""
    taken = board != STATES.index("empty")
    owner = reader.owner(stream) == (board == 0)
    return {
        "board": float((reader.says(stream) == board).float().mean()),
        "discs": float(owner[taken].float().mean()),
    }


@dataclass(frozen=True, eq=False)
class Turn:
    """An edit after which a square of each row is read as the other player's: x' = x + (t - r(x)) d.

    r(x) = u . x + b is the reading of "mine" less that of "yours", t what it is to be, and d what is added, with u . d = 1.
    """

    read: Float[Tensor, "row width"]
    offset: Float[Tensor, " row"]
    target: Float[Tensor, " row"]
    add: Float[Tensor, "row width"]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        reading = torch.einsum("rpw,rw->rp", value, self.read) + self.offset[:, None]
        return value + (self.target[:, None] - reading)[..., None] * self.add[:, None]


@dataclass(frozen=True, eq=False)
class Turns:
    """Games cut at a place each, and a disc of the board there that is turned so that other moves become legal.

    Args:
        tokens: the games, whole.
        place: whose prediction is looked at.
        square: the disc that is turned.
        mine: whether it is, before, the player's who is to move.
        other: another disc of the same board.
        before, after: the tokens that are legal on the board, and on the one with the disc turned.
    """

    tokens: Int[Tensor, "row position"]
    place: Int[Tensor, " row"]
    square: Int[Tensor, " row"]
    mine: Bool[Tensor, " row"]
    other: Int[Tensor, " row"]
    before: Bool[Tensor, "row token"]
    after: Bool[Tensor, "row token"]


def turn(mine: Int[Tensor, "*board"], yours: Int[Tensor, "*board"]) -> tuple[Int[Tensor, "*board square"], ...]:
    """The same boards with each of their discs turned: mine, yours. (Empty squares stay.)"""
    disc = (mine | yours)[..., None] & (1 << BITS)
    return mine[..., None] ^ disc, yours[..., None] ^ disc


def length(vectors: Float[Tensor, "*row width"]) -> Float[Tensor, "*row one"]:
    """Euclidean."""
    return vectors.norm(dim=-1, keepdim=True)


def edits(readers: Mapping[int, Reader], turns: Turns, way: Way, first: int, strength: float, seed: int = 0) -> Edits:
    """Turn the disc behind each layer from `first` on, at the place that is looked at.

    The reading becomes that of a disc of the other player (1 or -1) times `strength`. "other" and "random" add as much in length,
    factor by factor, as "writes" does.
    """
    place = torch.arange(turns.tokens.shape[1])
    target = strength * torch.where(turns.mine, -1.0, 1.0)
    found: dict[Site, At] = {}
    for layer in range(first, max(readers) + 1):
        one = readers[layer]
        read = (one.reads[..., 0] - one.reads[..., 1]).T
        own = read if way == "reads" else one.writes
        add = (own / (read * own).sum(1, keepdim=True))[turns.square]
        if way == "other":
            add = one.writes[turns.other] * length(add) / length(one.writes[turns.other])
        elif way == "random":
            drawn = torch.randn(add.shape, generator=drawing(f"turn-{seed}", layer))
            add = drawn * length(add) / length(drawn)
        offset = (one.offset[:, 0] - one.offset[:, 1])[turns.square]
        edit = Turn(read[turns.square], offset, target, add)
        found[Site("resid.post", layer)] = At(edit, place == turns.place[:, None])
    return found


def errors(logits: Float[Tensor, "row token"], legal: Bool[Tensor, "row token"]) -> float:
    """Mean over rows of false positives and false negatives of the N most probable tokens, N the number of legal ones."""
    rank = logits.argsort(1, descending=True).argsort(1)
    said = rank < legal.sum(1, keepdim=True)
    return float((said != legal).sum(1).float().mean())


def missed(model: "Model", turns: Turns, changes: Edits | None = None) -> float:
    """Errors against the boards with a disc turned; one forward pass."""
    logits = model.run(turns.tokens, changes or {})
    return errors(logits[torch.arange(len(turns.place)), turns.place].float(), turns.after)
