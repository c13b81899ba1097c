"""What other queries or keys make of the metric through attention weights alone (AtP*'s QK fix; P120)."""

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "row head query key"]


def query_changes(changed: Rows, pattern: Rows, slope: Rows) -> Float[Tensor, "row head query"]:
    """<A' - A, slope> of every query by itself."""
    return ((changed.double() - pattern.double()) * slope.double()).sum(-1)


def key_changes(changed: Rows, scores: Rows, pattern: Rows, slope: Rows) -> Float[Tensor, "row head key"]:
    """Sum over queries i of <A_i' - A_i, slope_i>, for every key t by itself, all others as they are.

    Only the score s_it changes, to s'_it. With p = A_it and r = exp(s' - s), softmax gives A'_it = p r / (1 - p + p r) and
    A'_ij = A_ij / (1 - p + p r), so

        <A_i' - A_i, g_i> = p (r - 1) / (1 - p + p r) * (g_it - <A_i, g_i>).

    Keys x queries operations, where softmax once more for every key would take keys x queries x keys. What is 1 - p, and behind it
    the difference of slopes, are summed over the other keys, so that nothing cancels where p is near 1.
    """
    p, slope = pattern.double(), slope.double()
    seen = scores > torch.finfo(scores.dtype).min / 4  # what is masked stays masked
    change = torch.where(seen, changed.double() - scores.double(), torch.zeros_like(p)).clamp(-600, 600)
    rest = _others(p)
    # r > 1 divided through by r, so that nothing overflows
    more = p * -torch.expm1(-change) / (rest * (-change).exp() + p).clamp(min=1e-300)
    less = p * torch.expm1(change) / (rest + p * change.exp()).clamp(min=1e-300)
    return (torch.where(change > 0, more, less) * (rest * slope - _others(p * slope))).sum(-2)


def _others(value: Float[Tensor, "*many key"]) -> Float[Tensor, "*many key"]:
    """For every key, the sum over all other keys."""
    before, behind = value.cumsum(-1).roll(1, -1), value.flip(-1).cumsum(-1).flip(-1).roll(-1, -1)
    before[..., 0] = 0
    behind[..., -1] = 0
    return before + behind
