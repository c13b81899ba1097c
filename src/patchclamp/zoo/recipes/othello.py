"""zoo/othello (Z8): a model of next moves in Othello on a board of 6 x 6 that is told nothing of the board.

A row is `<bos>` and up to 32 moves, each drawn evenly among the legal ones; who cannot move says `pass`, a move of its own, so that
players always alternate; behind the end is padding. A game with passes may have more than 32 moves and passes: the rest is cut off.
The law is known: with n legal moves each has probability 1 / n, so the smallest possible loss is the mean of log n. Which moves are
legal hangs on all discs' colours, and these on the whole game.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.sites import Site
from patchclamp.training import Rows, Training
from patchclamp.zoo.recipes import _board
from patchclamp.zoo.recipes._board import MOVABLE, NAMES, SIDE, moves, play, squares
from patchclamp.zoo.recipes._look import losses
from patchclamp.zoo.recipes._othello import Reader, Turns, Way, edits, fit, missed, reader, right, states, turn
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, drawing, held_out

if TYPE_CHECKING:
    from patchclamp.models.model import Model

LENGTH, LAYERS, WIDTH = 32, 6, 64
PAD, BOS, PASS = SPECIAL.index("<pad>"), SPECIAL.index("<bos>"), len(SPECIAL)
FIRST = PASS + 1
"""The first square's token."""
VOCABULARY = (*SPECIAL, "pass", *(NAMES[square] for square in MOVABLE))
OPENING = 10
"""Moves of a game that are not judged: most openings of held-out games are in those that are trained on, too."""
LATEST = 26
"""The last place whose board is changed: behind it few boards have moves that hang on one disc."""
STRENGTHS = (1.0, 2.0)
WAYS: tuple[Way, ...] = ("reads", "writes")
FITTED = 512
"""Games that readers are fitted to."""
EMBED = -1
"""The layer before the first, among readers."""


@dataclass(frozen=True)
class Othello:
    """Random games. All moves and passes count.

    Labels, by place (what is known behind its token): `mine` and `yours`, the board's discs as bits, of the player to move and of
    the other.
    """

    seed: int = 0
    length: int = LENGTH

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"othello-{SIDE}-{self.length}-seed-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update."""
        games = play(count, self.length, drawing(self.name, step))
        token = torch.full((SIDE**2,), PAD).index_copy(0, torch.tensor(MOVABLE), FIRST + torch.arange(len(MOVABLE)))
        moved = torch.where(games.moved == _board.PASSED, PASS, PAD).where(games.moved < 0, token[games.moved.clamp(min=0)])
        tokens = torch.cat([torch.full((count, 1), BOS), moved], 1)
        weights = (tokens != PAD).float()
        weights[:, 0] = 0
        return Rows(tokens, weights, tokens != PAD, {"mine": games.mine, "yours": games.yours})


def allowed(mine: Int[Tensor, "*board"], yours: Int[Tensor, "*board"]) -> Bool[Tensor, "*board token"]:
    """The tokens that may follow on a board: its legal moves; a pass, where there are none and the other player has one."""
    legal = moves(mine, yours)
    found = torch.zeros(*mine.shape, len(VOCABULARY), dtype=torch.bool)
    found[..., FIRST:] = squares(legal)[..., list(MOVABLE)]
    found[..., PASS] = (legal == 0) & (moves(yours, mine) != 0)
    return found


def boards(rows: Rows) -> tuple[Int[Tensor, "row place"], Int[Tensor, "row place"], Bool[Tensor, "row place"]]:
    """Discs of the player to move and of the other behind each token but the last, and whether the game goes on there."""
    assert rows.labels is not None
    return rows.labels["mine"], rows.labels["yours"], rows.weights[:, 1:] > 0


def build(seed: int = 0) -> Any:
    """A GPT-2 of 6 layers of 4 heads, width 64, 192 ReLU neurons a layer, learned positions; weights drawn with deviation 1 / 16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=LENGTH + 1, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_inner=3 * WIDTH, activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=1 / 16, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=None,
        pad_token_id=PAD,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def late(rows: Rows) -> Bool[Tensor, "row place"]:
    """Places that are judged."""
    asked = boards(rows)[2].clone()
    asked[:, :OPENING] = False
    return asked


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Behind ten moves of held-out games: `legal`, the share of most probable next tokens that are; `excess`, loss above the law's."""
    rows = held_out(Othello(seed), 256)
    mine, yours, _ = boards(rows)
    logits, may, asked = model.run(rows.tokens), allowed(mine, yours), late(rows)
    legal = may.gather(2, logits[:, :-1].argmax(-1, keepdim=True))[..., 0]
    excess = losses(logits, rows.tokens) - may.sum(-1).clamp(min=1).log()
    return {"legal": float(legal[asked].float().mean()), "excess": float(excess[asked].mean())}


@cache
def blind(seed: int = 0) -> float:
    """Share of legal moves of one who knows at each place which squares are taken, and the linear map from them to what is legal."""
    fitted, held = (held_out(Othello(seed), count, step) for count, step in ((2048, -6), (512, -7)))
    right = total = 0.0
    for place in range(OPENING, LENGTH):
        seen = list[tuple[Tensor, Tensor]]()
        for rows in (fitted, held):
            mine, yours, asked = (value[:, place] for value in boards(rows))
            seen.append((squares(mine | yours)[asked].float(), allowed(mine, yours)[asked]))
        (taken, may), (given, wanted) = seen
        weights = fit(taken, may.float())
        said = (torch.cat([given.double(), torch.ones(len(given), 1)], 1) @ weights).argmax(1, keepdim=True)
        right, total = right + float(wanted.gather(1, said).sum()), total + len(given)
    return right / total


@dataclass(frozen=True, eq=False)
class Seen:
    """A model's residual stream where games go on, by layer (`EMBED`: the embedding), the boards there and their places."""

    stream: dict[int, Float[Tensor, "row width"]]
    board: Int[Tensor, "row square"]
    place: Int[Tensor, " row"]

    def coloured(self) -> "Seen":
        """The same with boards as black and white: black has the even places."""
        discs = (self.board < 2) & (self.place[:, None] % 2 == 1)
        return replace(self, board=torch.where(discs, 1 - self.board, self.board))


def seen(model: "Model", rows: Rows) -> Seen:
    """One forward pass."""
    mine, yours, asked = boards(rows)
    values = model.record(rows.tokens, ["embed", "L*.resid.post"])
    sites = {EMBED: Site("embed")} | {layer: Site("resid.post", layer) for layer in range(model.layers)}
    place = torch.arange(asked.shape[1]).expand_as(asked)
    return Seen({layer: values[site][:, :-1][asked] for layer, site in sites.items()}, states(mine, yours)[asked], place[asked])


def readers(given: Seen) -> dict[int, Reader]:
    """Of each layer."""
    return {layer: reader(stream, given.board, given.place) for layer, stream in given.stream.items()}


def layered(given: Seen, held: Seen) -> dict[int, dict[str, float]]:
    """By layer, how right readers are on games that they were not fitted to."""
    return {layer: right(one, held.stream[layer], held.board) for layer, one in readers(given).items()}


def by_layer(model: "Model", seed: int = 0, colours: bool = False) -> dict[int, dict[str, float]]:
    """Shares of squares' states and of discs' owners that are read right in held-out games, by layer; fitted to 512 others.

    Args:
        model: any model of these rows.
        seed: of the data.
        colours: as black and white, not as mine and yours.

    Cost: two forward passes of 512 and 256 rows, and least squares.
    """
    given, held = _seen(model, seed)
    return layered(given.coloured(), held.coloured()) if colours else layered(given, held)


def _seen(model: "Model", seed: int) -> tuple[Seen, Seen]:
    """What readers are fitted to, and what they are judged on."""
    return seen(model, held_out(Othello(seed), FITTED, -3)), seen(model, held_out(Othello(seed), 256, -2))


def turns(seed: int, step: int, count: int = 256) -> Turns:
    """Games of a step with a disc turned each, at a place behind the opening; those where no disc makes others legal are left out."""
    data = Othello(seed)
    rows, draw = held_out(data, count, step), drawing(f"{data.name}-turns", step)
    place, row = torch.randint(OPENING, LATEST + 1, (count,), generator=draw), torch.arange(count)
    mine, yours = (value[row, place] for value in boards(rows)[:2])
    before, after = squares(moves(mine, yours)), squares(moves(*turn(mine, yours)))
    taken = squares(mine | yours)
    fit_for = taken & after.any(-1) & before.any(-1, keepdim=True) & (after != before[:, None]).any(-1)
    chance = torch.rand(count, SIDE**2, generator=draw)
    square = torch.where(fit_for, chance, -1.0).argmax(1)
    rest = taken & (torch.arange(SIDE**2) != square[:, None])
    other = torch.where(rest, chance, -1.0).argmax(1)
    there = fit_for.any(1)
    legal = allowed(*(value[row, square] for value in turn(mine, yours)))
    found = (rows.tokens, place, square, squares(mine)[row, square], other, allowed(mine, yours), legal)
    return Turns(*(value[there] for value in found))


def chosen(model: "Model", readers: dict[int, Reader], asked: Turns) -> tuple[Way, int, float]:
    """Way, first layer and strength with the fewest errors; a forward pass each, 24 in all."""
    tried: dict[tuple[Way, int, float], float] = {
        (way, first, strength): missed(model, asked, edits(readers, asked, way, first, strength))
        for way in WAYS for first in range(model.layers) for strength in STRENGTHS
    }  # fmt: skip
    return min(tried, key=lambda one: tried[one])


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """The board is read, as mine and yours; turned there, moves of the board with a disc turned are said; with controls."""
    from patchclamp.models.model import Model

    given, held = _seen(model, seed)
    own = readers(given)
    layers = {layer: right(one, held.stream[layer], held.board) for layer, one in own.items()}
    colours, untrained = layered(given.coloured(), held.coloured()), by_layer(Model.load(build(seed)), seed)
    best = max(layers, key=lambda layer: layers[layer]["board"])
    before = max(one["board"] for one in untrained.values())
    wrong = 1 - layers[best]["board"]
    apart = max(one["discs"] for one in layers.values()) - max(one["discs"] for one in colours.values())
    legal, taken = measure(model, seed)["legal"], blind(seed)
    return (
        Finding(f"the board is read behind layer {best}: share of squares that are right", 1 - wrong, Goal("share", least=0.9)),
        Finding("what is misread, against the model before training", wrong / (1 - before), Goal("share", most=0.5)),
        Finding("what is misread, against the embedding alone", wrong / (1 - layers[EMBED]["board"]), Goal("share", most=0.5)),
        Finding("discs are read as mine and yours rather than black and white: share more", apart, Goal("share", least=0.1)),
        Finding(
            "moves are illegal, against who knows which squares are taken", (1 - legal) / (1 - taken), Goal("share", most=0.5)
        ),
        *_turned(model, own, seed),
    )


def _turned(model: "Model", own: dict[int, Reader], seed: int) -> tuple[Finding, ...]:
    """How discs are turned is chosen on games that the claims are not judged on."""
    way, first, strength = chosen(model, own, turns(seed, -4))
    asked = turns(seed, -5)
    none = missed(model, asked)

    def share(way: Way) -> float:
        return missed(model, asked, edits(own, asked, way, first, strength, seed)) / none

    does = "along what reads it" if way == "reads" else "by what a disc there adds"
    what = f"a disc turned behind layer {first} and later, {does}: errors against that board, of those without"
    return (
        Finding(what, share(way), Goal("share", most=0.5)),
        Finding("as much of another disc's direction instead", share("other"), Goal("share", least=0.9)),
        Finding("as much of a random direction instead", share("random"), Goal("share", least=0.9)),
    )


RECIPES = (
    Recipe(
        name="othello",
        row="Z8",
        about="6 layers of 4 heads (GPT-2, width 64, 192 neurons) on random games of Othello on a board of 6 x 6, a token a move",
        known="the board is in the residual stream, linearly, as discs of the player to move and of the other; turned there, other moves "
        "are said",
        paper="Li et al. 2022, Emergent World Representations, https://arxiv.org/abs/2210.13382; Nanda et al. 2023, "
        "https://arxiv.org/abs/2309.00941",
        minutes=30.0,
        goals=(Goal("legal", least=0.9),),
        build=build,
        data=Othello,
        training=Training(9000, batch=64, rate=3e-3, warmup=100, betas=(0.9, 0.98), decay=0.01, checkpoints=8, evaluate=250),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
    ),
)
