"""What vectors written to the residual stream add to the logits, straight: through the final norm at a held divisor."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.model import Model
from patchclamp.models.norms import held, scale_of
from patchclamp.models.scope import unobserved
from patchclamp.units.table import HELD


def straight(model: Model, writes: Float[Tensor, "write width"]) -> Iterator[Float[Tensor, "some token"]]:
    """U N w for every write w, some at a time: the final norm N divides by 1, so that it is linear; biases are left out.

    A run divides by one positive number more, which changes neither ranks nor ratios. What comes behind the unembedding (soft
    caps, multipliers) is left out, too.

    Cost: one unembedding per write.

    Raises:
        FamilyError: the final norm is neither a LayerNorm nor an RMS norm.
    """
    norm, unembed = model.anatomy.norm, model.anatomy.unembed
    scale = scale_of(norm, writes.shape[-1])
    size = max(1, HELD // int(model.anatomy.config.vocab_size))
    one = torch.ones(1, 1, 1, device=writes.device)
    with torch.no_grad(), unobserved():
        nothing = unembed(norm(torch.zeros_like(writes[:1, None])))
        for start in range(0, len(writes), size):
            some = writes[start : start + size, None]
            yield (unembed(held(norm, scale, some, one)) - nothing)[:, 0].double()
