"""What heads copy: the output-value circuit of each head by itself.

Paper: Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895 (P045).
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.models.model import Inputs, Model
from patchclamp.models.recording import head_writes
from patchclamp.models.scope import unobserved
from patchclamp.sites import Site
from patchclamp.units.readout import straight
from patchclamp.units.table import recorded

_LEAK, _LEAK_LOW = 1e-3, 0.05
"""How far, of the largest, pattern times values may be from what is written, in float32 and in lower precision."""


def copying(model: Model, inputs: Inputs) -> dict[str, Float[np.ndarray, "part example"]]:
    """Whether what a head takes from a token argues for that token: its output-value circuit, by itself.

    A head that looks at key j alone writes w_j = O v_j. Straight to the logits (the final norm linear, for its divisor is one
    positive number), that adds l_j = U N w_j. Of the token t_j that stands there,

        copying = share of other tokens of the vocabulary with l_j below l_j[t_j], ties half      chance .5; a copying head: 1
        raised  = (l_j[t_j] - mean l_j) / standard deviation of l_j over the vocabulary            0 for a head that writes nothing

    per row the mean over its real tokens (special ones at its beginning too). The paper's copying score adds up the logits
    that are raised at run time; rank and standard deviation are ours, since they do not depend on how much a head writes.

    Returns:
        By name, an array of heads (layer by layer) x rows. NaN in a layer whose heads write something else than their pattern
        times their values (where attention is gated behind it): it has no output-value circuit.

    Cost: one forward pass, and an unembedding per head and token.
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
    leak = _LEAK if z.dtype in (torch.float32, torch.float64) else _LEAK_LOW
    if float((made - z).abs().max()) > leak * float(z.abs().max()):
        unknown = torch.full(z.shape[:3], torch.nan, device=z.device)
        return unknown, unknown
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
