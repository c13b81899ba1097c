"""Information flow routes: how much each token's state owes to each head, MLP and earlier state, from one forward pass.

A state y is a sum of contributions x (what was there, what each head brought from each position, what the MLP wrote), and

    share(x) = p(x) / sum of p,   p(x) = max(0, |y| - |y - x|)     sizes in the 1-norm
    routes   = from the answer's position down, the contributions whose share is above a threshold, and what they came from

(Ferrando & Voita 2024, https://arxiv.org/abs/2403.00824). Nothing is closed and no corrupt prompt is needed, so that heads can be
described over any texts, without templates. A share says what is near to the sum, not what would be missed: on the benchmark
of Mueller et al. 2025 routes find circuits about half as well as effects do, and exact effects should stand beside them.

In blocks whose attention and MLP read one state and are added together, the state behind the block is the sum of both. Behind a
post-norm a head's contribution is its share of the norm's output, at the scale that this run has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import PatchclampError
from patchclamp.models.model import Inputs, Model
from patchclamp.models.recording import gain_at
from patchclamp.models.scope import unobserved
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

MEMORY = 1 << 26
"""Bytes that contributions of one chunk may take."""
THRESHOLD = 0.04


@dataclass(frozen=True, eq=False)
class Flow:
    """Shares of contributions in the states of some prompts.

    Args:
        heads: what a head brought from a source position to a target position, of the state behind attention.
        stayed: what was there before attention, of the same state.
        mlp: what the MLP wrote, of the state behind the block.
        kept: what was there before the MLP, of the same state; in parallel blocks there is one sum, and this is 1 - mlp.
        tokens: of each row, as text.
        last: the position of each row's last token.
    """

    heads: Float[Tensor, "layer row head target source"]
    stayed: Float[Tensor, "layer row position"]
    mlp: Float[Tensor, "layer row position"]
    kept: Float[Tensor, "layer row position"]
    tokens: tuple[tuple[str, ...], ...]
    last: Int[Tensor, " row"]

    def routes(self, row: int = 0, position: int | None = None, threshold: float = THRESHOLD) -> pl.DataFrame:
        """The contributions above `threshold` by which information reaches a position's last state, from the top down.

        Args:
            row: the prompt.
            position: by default its last token.
            threshold: of shares.

        Returns:
            A row per contribution: level (the block), source, target (positions), part ("residual", L3.h2, L3.mlp), share.

        Raises:
            PatchclampError: a threshold outside 0 to 1, or a position that the prompt does not have.
        """
        count = len(self.tokens[row])
        start = int(self.last[row]) if position is None else position
        if not 0 <= threshold < 1 or not 0 <= start < count:
            raise PatchclampError(
                f"routes above {threshold} to position {start} were asked for: a share from 0 up, positions 0 to {count - 1}"
            )
        rows, reached = list[dict[str, object]](), {start}
        for level in reversed(range(len(self.heads))):
            before = set[int]()
            for target in sorted(reached):
                before |= self._step(rows, row, level, target, threshold)
            reached = before
        kinds = {"level": pl.Int64, "source": pl.Int64, "target": pl.Int64, "part": pl.String, "share": pl.Float64}
        return pl.DataFrame(rows, schema=kinds).sort("level", "target", "source", "part")

    def _step(self, rows: list[dict[str, object]], row: int, level: int, target: int, threshold: float) -> set[int]:
        """One state and what it came from."""
        mlp, kept = float(self.mlp[level, row, target]), float(self.kept[level, row, target])
        if mlp > threshold:
            rows.append({"level": level, "source": target, "target": target, "part": f"L{level}.mlp", "share": mlp})
        if max(mlp, kept) <= threshold:
            return set()
        found = set[int]()
        stayed = float(self.stayed[level, row, target])
        if stayed > threshold:
            rows.append({"level": level, "source": target, "target": target, "part": "residual", "share": stayed})
            found.add(target)
        heads = self.heads[level, row, :, target]
        for head, source in (heads > threshold).nonzero().tolist():
            share = float(heads[head, source])
            rows.append({"level": level, "source": source, "target": target, "part": f"L{level}.h{head}", "share": share})
            found.add(source)
        return found


def flow(model: Model, inputs: Inputs) -> Flow:
    """Shares of all contributions in every state of some prompts.

    Args:
        model: the model.
        inputs: a batch, text, several texts or token ids.

    Cost: one forward pass with attention patterns kept, and per layer as many subtractions as there are heads times pairs of
    positions times the width, in chunks of 64 MiB.
    """
    batch = model.batch(inputs).to(model.device)
    kinds = ("resid.pre", "resid.post", "pattern", "v", "attn", "mlp.write", *(() if model.anatomy.parallel else ("resid.mid",)))
    kept = model.record(batch, [Site(kind, layer) for layer in range(model.layers) for kind in kinds])
    layers = [_layer(model, batch, layer, {kind: kept[Site(kind, layer)] for kind in kinds}) for layer in range(model.layers)]
    decode = model.tokenizer.decode
    first = (batch.mask.shape[1] - batch.mask.sum(1)).tolist()
    tokens = tuple(
        tuple("" if at < begin else str(decode([token])) for at, token in enumerate(row))
        for row, begin in zip(batch.tokens.tolist(), first, strict=True)
    )
    heads, stayed, mlp, still = (torch.stack(pieces) for pieces in zip(*layers, strict=True))
    return Flow(heads, stayed, mlp, still, tokens, torch.full((len(batch.tokens),), batch.tokens.shape[1] - 1))


def _layer(model: Model, batch: Batch, number: int, kept: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """heads, stayed, mlp, kept of one block."""
    parallel = model.anatomy.parallel
    state = kept["resid.post" if parallel else "resid.mid"].float()
    brought = _proximity_of_heads(model, number, kept, state)
    stayed, wrote = (
        _proximity(kept["resid.pre"].float(), state),
        _proximity(kept["mlp.write"].float(), kept["resid.post"].float()),
    )
    real = batch.mask.to(state.device)
    brought = brought * (real[:, None, :, None] & real[:, None, None, :])
    among = brought.sum((1, 3)) + stayed + (wrote if parallel else 0)
    among = among.clamp(min=torch.finfo(among.dtype).tiny)
    if parallel:
        mlp = wrote / among
        return (brought / among[:, None, :, None]).cpu(), (stayed / among).cpu(), mlp.cpu(), (1 - mlp).cpu()
    before = _proximity(state, kept["resid.post"].float())
    both = (before + wrote).clamp(min=torch.finfo(among.dtype).tiny)
    return (brought / among[:, None, :, None]).cpu(), (stayed / among).cpu(), (wrote / both).cpu(), (before / both).cpu()


def _proximity(part: Float[Tensor, "*state width"], state: Float[Tensor, "*state width"]) -> Float[Tensor, "*state"]:
    """max(0, |y| - |y - x|) in the 1-norm."""
    return (state.abs().sum(-1) - (state - part).abs().sum(-1)).clamp(min=0)


def _proximity_of_heads(
    model: Model, number: int, kept: dict[str, Tensor], state: Float[Tensor, "row position width"]
) -> Float[Tensor, "row head target source"]:
    """Of what each head brings from each position: pattern times the value there, through the output projection."""
    layer, sizes = model.anatomy.layers[number], model.anatomy.sizes[number]
    values, pattern = kept["v"], kept["pattern"].float()
    inner = sizes.heads * sizes.head_width
    with unobserved(), torch.no_grad():
        units = torch.eye(inner, dtype=values.dtype, device=values.device)[None]
        matrix = (layer.output(units) - layer.output(torch.zeros_like(units)))[0].float().unflatten(0, (sizes.heads, -1))
        gain = layer.scale if layer.attn_post is None else (gain_at(layer.attn_post, kept["attn"]) * layer.scale).float()
    values = values.float().repeat_interleave(sizes.heads // values.shape[2], 2)  # key/value heads as the heads that read them
    rows, length, width = state.shape
    out = pattern.new_zeros(pattern.shape)
    step = max(1, MEMORY // (4 * rows * length * width))
    for head in range(sizes.heads):
        written = torch.einsum("rpe,ew->rpw", values[:, :, head], matrix[head])
        for start in range(0, length, step):
            here = slice(start, start + step)
            brought = pattern[:, head, here, :, None] * written[:, None]
            brought = brought * (gain[:, here, None] if isinstance(gain, Tensor) else gain)
            out[:, head, here] = _proximity(brought, state[:, here, None].expand_as(brought))
    return out


# --- over texts

RELATIONS = ("itself", "previous", "first", "duplicate", "induction", "other")
"""Where a head brings from: the same position; the one before; the first; an earlier same token; what followed one; any other."""

CLASSES = ("word", "capital", "continuation", "number", "punctuation", "newline", "blank", "first")
"""What `token_class` tells."""


def token_class(text: str, before: str | None) -> str:
    """What kind of token this is: first, newline, number, punctuation, continuation (of a word), capital, word."""
    body = text.strip()
    if before is None:
        return "first"
    if not body:
        return "newline" if "\n" in text else "blank"
    if not any(character.isalnum() for character in body):
        return "punctuation"
    if body[0].isdigit():
        return "number"
    joined = not text[:1].isspace() and before[-1:].isalpha()
    return "continuation" if joined else "capital" if body[0].isupper() else "word"


def flow_heads(
    model: Model,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    classes: Callable[[str, str | None], str] = token_class,
    length: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """What each head brings, on average over the tokens of texts, by the class of the token and by where it brings it from.

    Args:
        model: the model.
        texts: texts, or their token ids; of each the first `length` tokens.
        classes: (token, token before or None) -> its class; of the token that receives.
        length: tokens at most.
        progress: told (texts done, texts).

    Returns:
        A row per head, class and relation (`RELATIONS`): site, class, relation, share (mean over tokens of that class of the share
        of their state that the head brings so), low, high (95 %, bootstrap over texts; empty for a single one), tokens, texts.

    Cost: one forward pass per text, see `flow`.

    Raises:
        PatchclampError: no text has two tokens.
    """
    sums: list[dict[tuple[str, str], Tensor]] = []
    counts: list[dict[str, int]] = []
    for done, text in enumerate(texts):
        ids = model.encode(text).tokens[0] if isinstance(text, str) else torch.tensor(list(text))
        ids = ids[:length]
        if len(ids) > 1:
            found, seen = _of_text(model, ids, classes)
            sums.append(found)
            counts.append(seen)
        if progress is not None:
            progress(done + 1, len(texts))
    if not sums:
        raise PatchclampError(f"{len(texts)} texts were given, and none of them has two tokens")
    return _averaged(model, sums, counts)


def _of_text(
    model: Model, ids: Int[Tensor, " position"], classes: Callable[[str, str | None], str]
) -> tuple[dict[tuple[str, str], Float[Tensor, "layer head"]], dict[str, int]]:
    """Sums over a text's tokens, by class and relation; and how many tokens there are of each class."""
    found = flow(model, ids[None])
    texts = found.tokens[0]
    kinds = [classes(text, texts[at - 1] if at else None) for at, text in enumerate(texts)]
    heads, where = found.heads[:, 0], _relations(ids)
    out, seen = dict[tuple[str, str], Tensor](), dict[str, int]()
    for kind in dict.fromkeys(kinds):
        mine = torch.tensor([one == kind for one in kinds])
        seen[kind] = int(mine.sum())
        for number, relation in enumerate(RELATIONS):
            chosen = (where == number) & mine[:, None]
            out[kind, relation] = torch.einsum("lhts,ts->lh", heads, chosen.to(heads))
    return out, seen


def _relations(ids: Int[Tensor, " position"]) -> Int[Tensor, "target source"]:
    """Which of `RELATIONS` stands between two positions; the first that fits."""
    length = len(ids)
    at = torch.arange(length)
    earlier, same = at[None] < at[:, None], ids[None] == ids[:, None]
    followed = torch.zeros_like(same)
    followed[:, 1:] = same[:, :-1]  # what stands before the source is what stands at the target
    fits = (at[None] == at[:, None], at[None] == at[:, None] - 1, (at[None] == 0) & earlier, same & earlier, followed & earlier)
    out = torch.full((length, length), len(RELATIONS) - 1)
    for number in reversed(range(len(fits))):
        out[fits[number]] = number
    return out


def _averaged(model: Model, sums: Sequence[dict[tuple[str, str], Tensor]], counts: Sequence[dict[str, int]]) -> pl.DataFrame:
    kinds = list(dict.fromkeys(kind for one in counts for kind in one))
    draws = torch.multinomial(
        torch.ones(1000, len(sums)), len(sums), replacement=True, generator=torch.Generator().manual_seed(0)
    )
    pieces: list[pl.DataFrame] = []
    sites = [str(Site("head", layer, head)) for layer, sizes in enumerate(model.anatomy.sizes) for head in range(sizes.heads)]
    for kind in kinds:
        seen = torch.tensor([one.get(kind, 0) for one in counts]).double()
        for relation in RELATIONS:
            nothing = torch.zeros_like(next(iter(sums[0].values())))
            each = torch.stack([one.get((kind, relation), nothing).flatten() for one in sums]).double()
            drawn = each[draws].sum(1) / seen[draws].sum(1, keepdim=True).clamp(min=1)
            low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
            alone = len(sums) < 2
            pieces.append(pl.DataFrame({
                "site": sites, "class": kind, "relation": relation, "share": (each.sum(0) / seen.sum()).numpy(),
                "low": pl.Series([None] * len(sites), dtype=pl.Float64) if alone else pl.Series(low.numpy()),
                "high": pl.Series([None] * len(sites), dtype=pl.Float64) if alone else pl.Series(high.numpy()),
                "tokens": int(seen.sum()), "texts": int((seen > 0).sum()),
            }))  # fmt: skip
    return pl.concat(pieces)
