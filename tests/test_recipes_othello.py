"""zoo/othello: games against a plain referee of the tests' own; readers and turned discs against what was planted."""

import math

import pytest
import torch

from patchclamp.models.editing import Seen
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.zoo.recipes import othello
from patchclamp.zoo.recipes._board import BITS, NAMES, OVER, PASSED, SIDE, bits, moves, play, squares, turned
from patchclamp.zoo.recipes._othello import edits, errors, fit
from patchclamp.zoo.recipes.backcopy import At
from patchclamp.zoo.recipes.othello import LENGTH, OPENING, VOCABULARY, Othello, allowed


def start() -> list[list[str]]:
    """The first board, as rows of letters."""
    return [list("......"), list("......"), list("..WB.."), list("..BW.."), list("......"), list("......")]


def taken_by(board: list[list[str]], row: int, column: int, who: str) -> list[tuple[int, int]]:
    """The discs that a move turns, square by square along each of eight lines; none, where the move is not allowed."""
    if board[row][column] != ".":
        return []
    found: list[tuple[int, int]] = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            line: list[tuple[int, int]] = []
            r, c = row + down, column + right
            while 0 <= r < 6 and 0 <= c < 6 and board[r][c] not in (".", who):
                line.append((r, c))
                r, c = r + down, c + right
            if line and 0 <= r < 6 and 0 <= c < 6 and board[r][c] == who:
                found += line
    return found


def free(board: list[list[str]], who: str) -> set[int]:
    """Squares that a player may choose."""
    return {6 * row + column for row in range(6) for column in range(6) if taken_by(board, row, column, who)}


def discs(board: list[list[str]], who: str) -> set[int]:
    """Squares that a player has."""
    return {6 * row + column for row in range(6) for column in range(6) if board[row][column] == who}


def listed(board: torch.Tensor) -> set[int]:
    """The squares of a number."""
    return set(squares(board).nonzero()[:, 0].tolist())


def test_games_are_those_of_a_plain_referee() -> None:
    """Boards, legal moves, passes and ends of 200 games, each move of them."""
    games = play(200, 40, torch.Generator().manual_seed(0))
    passed = early = 0
    for game in range(200):
        board, who, other = start(), "B", "W"
        for moved, mine, yours, legal in zip(
            games.moved[game].tolist(), games.mine[game], games.yours[game], games.legal[game], strict=True
        ):
            assert listed(mine) == discs(board, who) and listed(yours) == discs(board, other)
            may, theirs = free(board, who), free(board, other)
            assert listed(legal) == may
            if moved == OVER:
                assert not may and not theirs
                continue
            if moved == PASSED:
                assert not may and theirs
                passed += 1
            else:
                assert moved in may
                row, column = divmod(moved, 6)
                for r, c in [*taken_by(board, row, column, who), (row, column)]:
                    board[r][c] = who
            who, other = other, who
        assert moved == OVER
        early += any("." in row for row in board)
    assert passed > 50 and early > 2  # passes and games that end with empty squares are among them


def test_moves_on_any_board() -> None:
    """Boards with discs anywhere, which no game need reach: the moves of both players are the referee's, and so is what they turn."""
    draw = torch.Generator().manual_seed(1)
    kinds = torch.randint(0, 3, (200, SIDE**2), generator=draw)
    mine, yours = bits(kinds == 0), bits(kinds == 1)
    assert torch.equal(squares(mine), kinds == 0)
    found = moves(mine, yours)
    for number, kind in enumerate(kinds.tolist()):
        board = [["BW."[kind[6 * row + column]] for column in range(6)] for row in range(6)]
        assert listed(found[number]) == free(board, "B")
        assert listed(moves(yours[number : number + 1], mine[number : number + 1])[0]) == free(board, "W")
        for square in free(board, "B"):
            row, column = divmod(square, 6)
            own = turned(1 << BITS[square : square + 1], mine[number : number + 1], yours[number : number + 1])
            assert listed(own[0]) == {6 * r + c for r, c in taken_by(board, row, column, "B")}


# --- rows


def test_rows_are_games_told_by_their_moves() -> None:
    """Replayed from the words alone: boards, what may follow, weights and padding; squares' names are where they stand."""
    rows = Othello().rows(3, 300)
    may = allowed(rows.labels["mine"], rows.labels["yours"])
    assert rows.tokens.shape == (300, LENGTH + 1) and may.shape == (300, LENGTH, len(VOCABULARY))
    passes = 0
    for game, words in enumerate([[VOCABULARY[token] for token in row] for row in rows.tokens.tolist()]):
        board, who, other = start(), "B", "W"
        assert words[0] == "<bos>" and rows.weights[game, 0] == 0
        for place, word in enumerate(words[1:]):
            assert listed(rows.labels["mine"][game, place]) == discs(board, who)
            assert listed(rows.labels["yours"][game, place]) == discs(board, other)
            wanted = {NAMES[square] for square in free(board, who)} or ({"pass"} if free(board, other) else set())
            assert {VOCABULARY[token] for token in may[game, place].nonzero()[:, 0].tolist()} == wanted
            assert float(rows.weights[game, place + 1]) == float(bool(wanted)) == float(rows.mask[game, place + 1])
            assert (word in wanted) if wanted else word == "<pad>"
            passes += word == "pass"
            if word not in ("pass", "<pad>"):
                row, column = int(word[1]) - 1, "abcdef".index(word[0])
                for r, c in [*taken_by(board, row, column, who), (row, column)]:
                    board[r][c] = who
            who, other = other, who
    assert passes > 50


def test_moves_are_drawn_evenly() -> None:
    """First moves by chance, chi-squared of 4 kinds; second ones too, whatever the first was. Held-out rows are others."""
    rows = Othello().rows(0, 4000)
    first = torch.bincount(rows.tokens[:, 1], minlength=len(VOCABULARY))
    assert first.count_nonzero() == 4
    assert float(((first[first > 0] - 1000) ** 2 / 1000).sum()) < 25  # 3 degrees of freedom: beyond it once in 60,000 times
    for move in first.nonzero()[:, 0]:
        second = torch.bincount(rows.tokens[rows.tokens[:, 1] == move, 2])
        even = float(first[move]) / 3
        assert second.count_nonzero() == 3
        assert float(((second[second > 0] - even) ** 2 / even).sum()) < 25
    late = {tuple(row[: OPENING + 1]) for row in rows.tokens.tolist()}
    held = [tuple(row[: OPENING + 1]) for row in Othello().rows(-1, 1000).tokens.tolist()]
    assert sum(row in late for row in held) <= 10


def test_numbers_of_an_untrained_model_by_hand() -> None:
    """Share of legal ones among most probable tokens, and loss above the mean of log n, token by token in a loop."""
    model = Model.load(othello.build(0))
    rows = Othello().rows(-1, 256)
    logits = model.run(rows.tokens).double()
    may = allowed(rows.labels["mine"], rows.labels["yours"])
    legal, excess = list[float](), list[float]()
    for game in range(256):
        for place in range(OPENING, LENGTH):
            if rows.tokens[game, place + 1] != 0:
                row = logits[game, place]
                legal.append(float(may[game, place, row.argmax()]))
                loss = row.exp().sum().log() - row[rows.tokens[game, place + 1]]
                excess.append(float(loss) - math.log(int(may[game, place].sum())))
    numbers = othello.measure(model, 0)
    assert numbers["legal"] == pytest.approx(sum(legal) / len(legal), abs=1e-6)
    assert numbers["excess"] == pytest.approx(sum(excess) / len(excess), abs=1e-4)


# --- reading and turning


def test_least_squares_finds_what_made_the_values() -> None:
    draw = torch.Generator().manual_seed(0)
    given, weights = torch.randn(500, 6, generator=draw), torch.randn(7, 3, generator=draw)
    found = fit(given, given @ weights[:-1] + weights[-1])
    torch.testing.assert_close(found.float(), weights, atol=5e-3, rtol=0)  # the ridge takes a thousandth


def test_errors_are_false_positives_and_false_negatives() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, legal = torch.randn(50, 12, generator=draw), torch.rand(50, 12, generator=draw) < 0.3
    total = 0
    for row, may in zip(logits.tolist(), legal.tolist(), strict=True):
        order = sorted(range(12), key=lambda token: -row[token])
        said, wanted = set(order[: sum(may)]), {token for token in range(12) if may[token]}
        total += len(said - wanted) + len(wanted - said)
    assert errors(logits, legal) == pytest.approx(total / 50)
    assert errors(legal.float(), legal) == 0


def test_turned_boards_are_those_of_the_referee() -> None:
    """A disc of the board there changes hands; what is legal before and after, and another disc of the same board."""
    asked, rows = othello.turns(0, -4, 256), Othello().rows(-4, 256)
    games = {tuple(row): number for number, row in enumerate(rows.tokens.tolist())}
    assert 200 < len(asked.place) <= 256
    for number in range(len(asked.place)):
        game, place = games[tuple(asked.tokens[number].tolist())], int(asked.place[number])
        mine, yours = (listed(rows.labels[who][game, place]) for who in ("mine", "yours"))
        square, other = int(asked.square[number]), int(asked.other[number])
        assert square in mine | yours and other in (mine | yours) - {square} and bool(asked.mine[number]) == (square in mine)
        seen = list[set[str]]()
        for change in (set[int](), {square}):
            own, theirs = mine ^ change, yours ^ change
            cells = ["B" if at in own else "W" if at in theirs else "." for at in range(36)]
            seen.append({NAMES[at] for at in free([cells[6 * row : 6 * row + 6] for row in range(6)], "B")})
        for words, tokens in zip(seen, (asked.before[number], asked.after[number]), strict=True):
            assert {VOCABULARY[token] for token in tokens.nonzero()[:, 0].tolist()} == words
        assert seen[0] != seen[1] and seen[0] and seen[1]


def test_a_turned_disc_is_read_as_turned() -> None:
    """At the place that is looked at, behind each layer from the first on, the reading is what it is to be; before it as it was.

    What is added in place of it, another disc's direction or any, is as long factor by factor.
    """
    model, asked = Model.load(othello.build(0)), othello.turns(0, -4, 32)
    own = othello.readers(othello.seen(model, Othello().rows(-3, 128)))
    row, sites = torch.arange(len(asked.place)), ["L*.resid.post"]
    plain = model.record(asked.tokens, sites)
    earlier = torch.arange(asked.tokens.shape[1]) < asked.place[:, None]
    for way in ("reads", "writes"):
        values = model.record(asked.tokens, sites, edits(own, asked, way, 2, 1.5))
        for site, value in values.items():
            torch.testing.assert_close(value[earlier], plain[site][earlier])
            assert site.layer >= 2 or torch.equal(value, plain[site])
            if site.layer >= 2:
                found = torch.einsum("rw,wst->rst", value[row, asked.place], own[site.layer].reads) + own[site.layer].offset
                margin = found[row, asked.square, 0] - found[row, asked.square, 1]
                torch.testing.assert_close(margin, torch.where(asked.mine, -1.5, 1.5), atol=2e-2, rtol=0)
    made = {way: edits(own, asked, way, 5, 1.0)[Site("resid.post", 5)].edit for way in ("writes", "other", "random")}
    for edit in made.values():
        torch.testing.assert_close(edit.add.norm(dim=1), made["writes"].add.norm(dim=1))
        assert torch.equal(edit.read, made["writes"].read) and torch.equal(edit.target, made["writes"].target)
    cosine = torch.nn.functional.cosine_similarity(made["other"].add, own[5].writes[asked.other])
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


class Planted:
    """A model wired by hand, as far as these analyses look: the board is planted in its stream, and its moves are read from there.

    Args:
        follows: moves are those of the board in the stream; else, of the game, whatever is in the stream.
        coloured: the stream has discs as black and white.
    """

    layers, width = 2, 128

    def __init__(self, follows: bool = True, coloured: bool = False) -> None:
        draw = torch.Generator().manual_seed(7)
        self.follows, self.coloured = follows, coloured
        self.vectors = torch.randn(2 * SIDE**2 + LENGTH + 1, self.width, generator=draw)

    def game(self, tokens: torch.Tensor) -> torch.Tensor:
        """1, -1 or 0 for each square behind each token: mine, yours, empty."""
        mine, yours = (torch.full((len(tokens),), sum(1 << int(BITS[square]) for square in own)) for own in ((15, 20), (14, 21)))
        found = list[torch.Tensor]()
        for place in range(tokens.shape[1]):
            words = tokens[:, place]
            number = torch.tensor([NAMES.index(name) if name in NAMES else 0 for name in (VOCABULARY[word] for word in words)])
            disc = torch.where(words > 3, 1 << BITS[number], 0)
            flips = turned(disc, mine, yours)
            if place:
                mine, yours = yours & ~flips, mine | disc | flips
            found.append(squares(mine).float() - squares(yours).float())
        return torch.stack(found, 1)

    def stream(self, board: torch.Tensor) -> torch.Tensor:
        """What is planted."""
        place = torch.eye(LENGTH + 1)[: board.shape[1]].expand(len(board), -1, -1)
        sign = (1 - 2.0 * (torch.arange(board.shape[1]) % 2))[:, None] if self.coloured else 1.0
        return torch.cat([board * sign, (board == 0).float(), place], -1) @ self.vectors

    def record(self, tokens: torch.Tensor, sites: list[str]) -> dict[Site, torch.Tensor]:
        """The board is there from layer 0 on; the embedding has the place alone."""
        board = self.game(tokens)
        stream = self.stream(board)
        values = {Site("resid.post", layer): stream for layer in range(self.layers)}
        return {Site("embed"): self.vectors[-LENGTH - 1 :].expand(len(tokens), -1, -1), **values}

    def run(self, tokens: torch.Tensor, changes: dict[Site, At] | None = None) -> torch.Tensor:
        """Logits 1 for what is legal and 0 for what is not."""
        board = self.game(tokens)
        stream, places = self.stream(board), torch.arange(tokens.shape[1]).expand_as(tokens)
        for site, edit in sorted((changes or {}).items()):
            stream = edit(stream, Seen(site, {}, torch.ones_like(tokens, dtype=torch.bool), places))
        if self.follows:
            sign = (1 - 2.0 * (places % 2))[..., None] if self.coloured else 1.0
            board = ((stream @ torch.linalg.pinv(self.vectors))[..., : SIDE**2] * sign).round().clamp(-1, 1)
        return allowed(bits(board > 0), bits(board < 0)).float()


def test_a_planted_board_is_found() -> None:
    """Read without error, and turned without error: moves are then those of the turned board."""
    findings = othello.found(Planted(), 0)
    assert all(one.holds for one in findings)
    assert findings[0].number == 1.0 and findings[1].number == findings[2].number == findings[5].number == 0.0
    layers = othello.by_layer(Planted(), 0)
    assert layers[0] == layers[1] == {"board": 1.0, "discs": 1.0} and layers[othello.EMBED]["discs"] < 0.7


def test_a_board_that_is_not_used_is_read_and_not_found() -> None:
    """The same stream, and moves that do not hang on it: all that is read holds, and turning changes nothing."""
    findings = othello.found(Planted(follows=False), 0)
    assert [one.holds for one in findings] == [True] * 5 + [False] + [True] * 2
    assert findings[5].number == 1.0


def test_a_board_in_black_and_white_is_told_from_mine_and_yours() -> None:
    findings = othello.found(Planted(coloured=True), 0)
    assert not findings[0].holds and not findings[3].holds and findings[3].number < -0.1
    assert othello.by_layer(Planted(coloured=True), 0, colours=True)[0] == {"board": 1.0, "discs": 1.0}


@pytest.mark.long
def test_little_is_found_before_training() -> None:
    """The bar of shipped recipes, for this one: at most half of the claims hold, and not the first."""
    findings = othello.found(Model.load(othello.build(0)), 0)
    assert not findings[0].holds and not findings[5].holds
    assert findings[1].number == 1.0 and sum(one.holds for one in findings) <= len(findings) / 2


def test_who_sees_taken_squares_alone_knows_some_moves() -> None:
    """Better than any square that is empty, by a loop; and far from all."""
    rows = Othello().rows(-7, 512)
    may = allowed(rows.labels["mine"], rows.labels["yours"])
    asked = othello.late(rows)
    empty = ~squares(rows.labels["mine"] | rows.labels["yours"])
    chance = float((may.sum(-1) / empty.sum(-1).clamp(min=1))[asked].mean())
    assert chance + 0.1 < othello.blind(0) < 0.8
