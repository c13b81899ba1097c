"""Hard-concrete gates: exactly 0 or 1 with a probability that can be learned (Louizos et al. 2018, https://arxiv.org/abs/1712.01312).

    u ~ U(0, 1),  s = sigmoid((log u - log(1 - u) + a) / beta),  z = min(1, max(0, s (zeta - gamma) + gamma))
    P(z > 0) = sigmoid(a - beta log(-gamma / zeta)),   test time: z = min(1, max(0, sigmoid(a) (zeta - gamma) + gamma))

beta = 2/3, gamma = -0.1, zeta = 1.1 (the paper's).
"""

from math import log

import torch
from jaxtyping import Float
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
SHIFT = BETA * log(-GAMMA / ZETA)


def draw(
    logits: Float[Tensor, "setting part"], uniform: Float[Tensor, "setting example part"]
) -> tuple[Float[Tensor, "setting example part"], Float[Tensor, "setting example part"]]:
    """z and dz/da for the given draws of u; the slope is 0 where z is cut off."""
    soft = ((uniform.logit() + logits[:, None]) / BETA).sigmoid()
    stretched = soft * (ZETA - GAMMA) + GAMMA
    inside = ((stretched > 0) & (stretched < 1)).to(soft.dtype)
    return stretched.clamp(0, 1), inside * (ZETA - GAMMA) * soft * (1 - soft) / BETA


def open_probability(logits: Float[Tensor, "*setting part"]) -> Float[Tensor, "*setting part"]:
    """P(z > 0)."""
    return (logits - SHIFT).sigmoid()


def settled(logits: Float[Tensor, "*setting part"]) -> Float[Tensor, "*setting part"]:
    """Test-time gates: exactly 0 and 1 at the ends."""
    return (logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logits_of(probability: float) -> float:
    """The logit a at which P(z > 0) is `probability`."""
    return float(torch.tensor(probability, dtype=torch.float64).logit()) + SHIFT
