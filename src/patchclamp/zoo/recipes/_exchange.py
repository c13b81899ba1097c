"""Exchanging parts: a small transformer and a compiled program, each with a part's value from another input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.zoo.compiled import Compiled
from patchclamp.zoo.compiled.truth import edges_of, run
from patchclamp.zoo.compiled.weights import NOTHING, SCALE

if TYPE_CHECKING:
    from patchclamp.models.normless import NormlessForCausalLM

Patch = Mapping[str, Tensor]
"""Part -> what it gives: [row, position, width]; of a head, its z."""


def forward(
    model: "NormlessForCausalLM", tokens: Int[Tensor, "row position"], patch: Patch | None = None
) -> tuple[Float[Tensor, "row position token"], dict[str, Tensor]]:
    """Logits, and what every part gives; parts in `patch` give that instead. Attention looks both ways, nothing is padded."""
    patch, gives = patch or {}, dict[str, Tensor]()
    places = torch.arange(tokens.shape[1], device=tokens.device)
    blocks: Any = model.model.layers
    x = model.model.embed_tokens(tokens) + model.model.embed_positions(places)
    for number, block in enumerate(blocks):
        attention = block.self_attn
        q, k, v = (
            module(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        own = ((q @ k.mT).softmax(-1) @ v).unbind(1)
        named: dict[str, Tensor] = {f"L{number}.h{head}": z for head, z in enumerate(own)}
        heads = {part: patch[part] if part in patch else z for part, z in named.items()}  # noqa: SIM401 (get's type has None)
        x = x + attention.o_proj(torch.cat(list(heads.values()), -1))
        mlp = f"L{number}.mlp"
        gives |= {**heads, mlp: patch[mlp] if mlp in patch else block.mlp(x)}
        x = x + gives[mlp]
    return model.lm_head(x), gives


def said(one: Compiled, logits: Float[np.ndarray, "row position token"]) -> Float[Tensor, "row inside token"]:
    """The program's output as a distribution over tokens: the shares that it says, and the rest on `nothing`."""
    shares = np.clip(logits[:, 1:] / SCALE, 0, 1)
    shares[..., one.blueprint.vocabulary.index(NOTHING)] = np.clip(1 - shares.sum(-1), 0, 1)
    return torch.from_numpy(shares).float()


@dataclass(frozen=True, eq=False)
class Draw:
    """Base and source inputs, and what the program says of the base; with a part exchanged, where one is."""

    base: Int[Tensor, "row position"]
    source: Int[Tensor, "row position"]
    plain: Float[Tensor, "row inside token"]
    exchanged: Float[Tensor, "row inside token"]


def draw(one: Compiled, count: int, part: str | None, rng: np.random.Generator) -> Draw:
    """Inputs of one length (up to the longest), drawn alike; `part` is the program's that is exchanged, None for none."""
    program, words = one.program, np.array([one.blueprint.vocabulary.index(word) for word in one.program.alphabet])
    length = int(rng.integers(2, program.longest + 1))
    base, source = (np.hstack([np.ones((count, 1), dtype=int), rng.choice(words, (count, length))]) for _ in range(2))
    closed = [edge for edge in edges_of(one.blueprint) if edge[0] == part]
    plain = run(one.blueprint, base).logits
    other = run(one.blueprint, base, closed, run(one.blueprint, source).writes).logits
    return Draw(torch.from_numpy(base), torch.from_numpy(source), said(one, plain), said(one, other))


def loss_of(model: "NormlessForCausalLM", drawn: Draw, part: str, unused: str, strict: float) -> Float[Tensor, ""]:
    """Behaviour + interchange of `part` + strict * that of `unused`."""
    plain, _ = forward(model, drawn.base)
    _, source = forward(model, drawn.source)
    exchanged, _ = forward(model, drawn.base, {part: source[part]})
    kept, _ = forward(model, drawn.base, {unused: source[unused]})
    terms = ((plain, drawn.plain, 1.0), (exchanged, drawn.exchanged, 1.0), (kept, drawn.plain, strict))
    return torch.stack([weight * cross_entropy(logits, wanted) for logits, wanted, weight in terms]).sum()


def cross_entropy(logits: Float[Tensor, "row position token"], wanted: Float[Tensor, "row inside token"]) -> Float[Tensor, ""]:
    """Mean over rows and positions behind the first."""
    return -(wanted * logits[:, 1:].log_softmax(-1)).sum(-1).mean()
