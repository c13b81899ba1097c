"""What `found` of the recipes shares: how right logits are, and parts held at their mean."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchclamp.edits import Put
from patchclamp.models.editing import Edits
from patchclamp.sites import Site

if TYPE_CHECKING:
    from patchclamp.models.model import Model


def losses(logits: Float[Tensor, "row position token"], tokens: Int[Tensor, "row position"]) -> Float[Tensor, "row next"]:
    """-log p of each token but the first, given those before it, in nats."""
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")


def judged(
    logits: Float[Tensor, "row position token"], tokens: Int[Tensor, "row position"], asked: Bool[Tensor, "row position"]
) -> dict[str, float]:
    """`test_loss` (nats) and `accuracy` (share of most probable tokens that are right) of predicting the tokens that are asked for."""
    chosen = asked[:, 1:]
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    return {"test_loss": float(losses(logits, tokens)[chosen].mean()), "accuracy": float(right[chosen].float().mean())}


def means(model: "Model", tokens: Int[Tensor, "row position"], sites: Iterable[Site]) -> Edits:
    """Edits that hold each site at its mean over these rows and their positions; one forward pass."""
    chosen = sorted(sites)
    if not chosen:
        return {}
    return {site: Put(value.mean((0, 1))) for site, value in model.record(tokens, chosen).items()}


def named(sites: set[Site]) -> str:
    """Heads by name, or none."""
    return ", ".join(f"L{site.layer}.h{site.index}" for site in sorted(sites)) or "none"
