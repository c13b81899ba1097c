"""What a training will take: counted, and timed on some updates that change nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from patchclamp.models.model import Model
from patchclamp.training.checkpoint import adapted
from patchclamp.training.clamp import Clamp
from patchclamp.training.data import Data
from patchclamp.training.loss import Loss, next_token
from patchclamp.training.plan import Training
from patchclamp.training.trainer import as_found
from patchclamp.training.update import Update

MOMENTS = {"adamw": 2, "sgd": 1}
"""Numbers that the optimizer keeps per weight."""


@dataclass(frozen=True)
class Estimate:
    """What a training will take.

    Args:
        parameters: of the model.
        trained: of these, what is trained.
        tokens: real tokens of all updates, at the rate of those that were timed.
        update: seconds of an update (median of those timed, on this machine as busy as it is).
        seconds: of all updates; measures and checkpoints come on top.
        memory: bytes of weights, gradients and the optimizer's numbers.
        passes: bytes that passes took on top at their peak; None where it cannot be told (not on CUDA).
        checkpoint: bytes of a checkpoint with its optimizer state.
        disk: bytes of all checkpoints at the end.
    """

    parameters: int
    trained: int
    tokens: float
    update: float
    seconds: float
    memory: int
    passes: int | None
    checkpoint: int
    disk: int


def estimate(
    model: Model, data: Data, training: Training, *, clamps: Sequence[Clamp] = (), loss: Loss = next_token, budget: float = 10.0
) -> Estimate:
    """Count, and time some updates of rate 0: nothing is written, and the weights stay as they are, bit for bit.

    Args:
        model: what would be trained.
        data: rows.
        training: the numbers.
        clamps: what would be held. (Their changes of weights are left out.)
        loss: of the logits and the rows.
        budget: seconds that timing may take, as far as at least two updates fit.

    Raises:
        TrainingError: what `train` would refuse.
    """
    with as_found(model):
        update = Update(model, data, training, clamps, loss)
        update.require_fit()
        cuda = model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        began, times, tokens = time.perf_counter(), list[float](), list[float]()
        while len(times) < 2 or (len(times) < 12 and time.perf_counter() - began < budget):
            start = time.perf_counter()
            tokens.append(update.tried(len(times)))
            times.append(time.perf_counter() - start)
    each = median(times[1:])  # the first one pays for what is set up once
    weights = {id(p): p for p in model.hf.parameters()}.values()
    trained = [p for p in weights if p.requires_grad]
    all_bytes, trained_bytes = (sum(p.numel() * p.element_size() for p in some) for some in (weights, trained))
    moments = MOMENTS[training.optimizer] * trained_bytes
    memory = all_bytes + trained_bytes + moments
    kept = all_bytes + (trained_bytes if adapted(model) else 0)
    stored = len(training.kept) if training.states == "all" else 1
    return Estimate(
        parameters=sum(p.numel() for p in weights), trained=sum(p.numel() for p in trained),
        tokens=sum(tokens) / len(tokens) * training.steps, update=each, seconds=each * training.steps, memory=memory,
        passes=max(0, torch.cuda.max_memory_allocated(model.device) - memory) if cuda else None,
        checkpoint=kept + moments, disk=len(training.kept) * kept + stored * moments,
    )  # fmt: skip
