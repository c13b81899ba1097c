"""LoRA: small factors are trained, and the model that they are put on stays as it is."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model

ALL = "all-linear"


def lora(
    model: Model,
    rank: int,
    *,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL,
    seed: int = 0,
) -> Model:
    """A model that computes as this one does, with factors to train beside its frozen weights:

        W' = W + alpha / rank * B A,   A [rank, in] drawn, B [out, rank] zero

    The frozen weights are this model's own tensors, not copies; nothing of it is changed, not even what requires gradients.
    Checkpoints of its training hold weights with the factors folded in, so that they load as models; and `adapter/`, as peft
    writes it. LoRA: https://arxiv.org/abs/2106.09685.

    Args:
        model: what is adapted.
        rank: of the factors.
        alpha: by default the rank, so that the scale is 1.
        dropout: on what A reads, while training.
        targets: names of modules (their ends), or "all-linear": every linear map but the unembedding; where experts are fused into
            one tensor, the linear maps of attention.
        seed: of A.

    Raises:
        TrainingError: no module is called so, or the model wears an adapter already.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise TrainingError(
            f"LoRA of rank {rank} with dropout {dropout} was asked: give a rank of 1 or more, and dropout below 1"
        )
    if hasattr(model.hf, "peft_config"):
        raise TrainingError(f"{model.name} wears an adapter already: fold it in (merge_and_unload), or train that one")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainingError("LoRA needs peft: pip install 'patchclamp[peft]'") from None
    shared: dict[int, Any] = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.hf.parameters()}
    base = copy.deepcopy(model.hf, shared)  # modules anew, weights the same memory
    names = linear_maps(base) if targets == ALL else [targets] if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, lora_dropout=dropout,
        target_modules=names, fan_in_fan_out=_transposed(base, names),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it by that name
        torch.manual_seed(seed)
        try:
            adapted: Any = get_peft_model(base, config)
        except ValueError as error:
            raise TrainingError(f"LoRA was asked of {targets!r}: {str(error).splitlines()[0]}") from None
    return replace(Model.load(adapted.eval(), tokenizer=model.tokenizer), name=model.name)


def linear_maps(hf: Any) -> list[str]:
    """Every linear map but the unembedding, by its whole name; where experts are fused into one tensor, those of attention alone.

    (peft takes MLPs' maps in such a model for its experts', and cannot fold those factors in again.)
    """
    last, fused = hf.get_output_embeddings(), any(weight.ndim == 3 for weight in hf.parameters())
    return [
        name
        for name, module in hf.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not last
        if not (fused and ".mlp." in name)
    ]


def _transposed(hf: nn.Module, names: Sequence[str]) -> bool:
    """Whether the adapted maps keep their weights as [in, out] (GPT-2's Conv1D)."""
    ends = tuple(names)
    return any(type(module).__name__ == "Conv1D" and name.endswith(ends) for name, module in hf.named_modules())
