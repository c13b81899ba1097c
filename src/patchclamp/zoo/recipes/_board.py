"""Othello on a board of 6 x 6, many games at once: squares as bits of one number a board.

Two players in turn put a disc on an empty square from where a straight line runs over discs of the other player, one at least, to
one of their own: those between change hands. Who has no such square passes; where neither has one the game is over. Four discs
lie in the middle at the beginning, crosswise, and black begins. A board is told as the discs of the player to move ("mine") and
of the other ("yours"), so that both players see the same game.

A row of the board has seven bits, the last of which is no square: lines that run out at the side end there.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SIDE = 6
BITS = torch.tensor([(SIDE + 1) * row + column for row in range(SIDE) for column in range(SIDE)])
"""The bit of each square, row by row."""
WHOLE = int((1 << BITS).sum())
STEPS = torch.tensor([1, SIDE, SIDE + 1, SIDE + 2])[:, None]
"""To the next bit: along a row, down and back, down, down and on; as many the other way."""
NAMES = tuple(f"{'abcdef'[column]}{row + 1}" for row in range(SIDE) for column in range(SIDE))
WHITE, BLACK = ((14, 21), (15, 20))
"""Squares that are taken at the beginning."""
MOVABLE = tuple(square for square in range(SIDE**2) if square not in (*WHITE, *BLACK))
"""Squares that can be moved to: 32."""
PASSED, OVER = -1, -2
"""In place of a move's square."""


def bits(squares: Bool[Tensor, "*board square"]) -> Int[Tensor, "*board"]:
    """Squares as one number."""
    return (squares.long() << BITS).sum(-1)


def squares(board: Int[Tensor, "*board"]) -> Bool[Tensor, "*board square"]:
    """Which squares a number has."""
    return ((board[..., None] >> BITS) & 1).bool()


def _next(lines: Int[Tensor, "direction board"]) -> Int[Tensor, "direction board"]:
    """One square on, in each of the eight directions."""
    half = len(STEPS)
    return torch.cat([lines[:half] << STEPS, lines[half:] >> STEPS]) & WHOLE


def _runs(start: Int[Tensor, " board"], over: Int[Tensor, " board"]) -> Int[Tensor, "direction board"]:
    """Lines from these squares over some of others, in each of the eight directions, as far as they go."""
    found = _next(start.expand(2 * len(STEPS), -1)) & over
    for _ in range(SIDE - 3):
        found = found | (_next(found) & over)
    return found


def _together(lines: Int[Tensor, "direction board"]) -> Int[Tensor, " board"]:
    """Squares of any direction."""
    while len(lines) > 1:
        lines = lines[: len(lines) // 2] | lines[len(lines) // 2 :]
    return lines[0]


def moves(mine: Int[Tensor, "*board"], yours: Int[Tensor, "*board"]) -> Int[Tensor, "*board"]:
    """The squares that the player to move may choose."""
    own, other = mine.flatten(), yours.flatten()
    return _together(_next(_runs(own, other)) & ~(own | other)).reshape(mine.shape)


def turned(move: Int[Tensor, " board"], mine: Int[Tensor, " board"], yours: Int[Tensor, " board"]) -> Int[Tensor, " board"]:
    """The discs that change hands by a move."""
    lines = _runs(move, yours)
    return _together(torch.where((_next(lines) & mine) != 0, lines, 0))


@dataclass(frozen=True, eq=False)
class Games:
    """Games as they were played.

    Args:
        moved: the square of each move; `PASSED`, or `OVER` where the game is.
        mine, yours: discs before each move of the player to move, and of the other.
        legal: the squares that the player to move may choose.
    """

    moved: Int[Tensor, "game move"]
    mine: Int[Tensor, "game move"]
    yours: Int[Tensor, "game move"]
    legal: Int[Tensor, "game move"]


def play(count: int, length: int, draw: torch.Generator) -> Games:
    """Games of moves that are drawn evenly among the legal ones, up to `length` moves and passes.

    Cost: linear in `count * length`; 128 games of 32 moves take some milliseconds.
    """
    mine, yours = (torch.full((count,), sum(1 << int(BITS[square]) for square in discs)) for discs in (BLACK, WHITE))
    seen = list[tuple[Tensor, Tensor, Tensor, Tensor]]()
    for _ in range(length):
        legal = moves(mine, yours)
        chosen = torch.where(squares(legal), torch.rand(count, SIDE**2, generator=draw), -1.0).argmax(1)
        over = legal == 0
        if over.any():  # the other player is asked only where it matters
            over = over & (moves(yours, mine) == 0)
        moved = torch.where(legal != 0, chosen, torch.where(over, OVER, PASSED))
        seen.append((moved, mine, yours, legal))
        disc = torch.where(legal != 0, 1 << BITS[chosen], 0)
        flips = turned(disc, mine, yours)
        after = yours & ~flips, mine | disc | flips
        mine, yours = (torch.where(over, old, new) for old, new in zip((mine, yours), after, strict=True))
    return Games(*(torch.stack(values, 1) for values in zip(*seen, strict=True)))
