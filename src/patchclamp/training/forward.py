"""The forward pass of a training: positions and masks as the family takes them, gradients wherever they are asked for."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.training.data import Rows


def logits_of(model: Model, rows: Rows) -> Float[Tensor, "row position token"]:
    """Logits at every position, in the mode (train, eval) that the model is in.

    Where rows are padded, positions count from each row's first real token, and padding is masked. Without padding neither is
    given, so that kernels may take their causal path.
    """
    options: dict[str, Any] = {}
    if rows.mask is not None and not bool(rows.mask.all()):
        options["attention_mask"] = rows.mask.long()
        if model.anatomy.takes_positions:
            options["position_ids"] = (rows.mask.long().cumsum(-1) - 1).clamp(min=0)
    return model.hf(input_ids=rows.tokens, use_cache=False, **options).logits


def require_fit(model: Model, rows: Rows) -> None:
    """Raise where rows ask for nothing, for tokens that the model does not have, or for positions that it has no vector for."""
    if not rows.weight:
        raise TrainingError("the rows of an update ask for no prediction: give a weight other than 0 behind the first token")
    words, there = int(model.hf.get_input_embeddings().weight.shape[0]), rows.tokens[rows.real]
    if int(there.max()) >= words or int(there.min()) < 0:
        raise TrainingError(
            f"rows hold the token {int(there.max() if there.min() >= 0 else there.min())}, and {model.name} has tokens 0 to {words - 1}: "
            "give the model's own tokenizer, or a config with a larger vocab_size"
        )
    longest, most = rows.tokens.shape[1], getattr(model.anatomy.config, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise TrainingError(f"rows are {longest} tokens long, and {model.name} has {most} positions: give shorter rows (--block)")


def autocast(model: Model, precision: str) -> torch.autocast:
    """Lower precision where asked, of the model's device."""
    return torch.autocast(model.device.type, getattr(torch, precision), enabled=precision != "float32")
