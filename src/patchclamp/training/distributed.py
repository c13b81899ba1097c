"""Several processes: rows of an update are dealt out, gradients summed; the update is the same in each.

Anything that sets up torch.distributed serves: `torchrun`, `accelerate launch`, or a call of `init_process_group`. Every process
makes the whole batch (data is a function of the step) and takes its share of the rows, so that no one has to send any.
"""

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from patchclamp.errors import TrainingError


def rank() -> int:
    """This process's number; 0 where there is one only."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def joined(device: str | None = None) -> Generator[str | None]:
    """Join the processes that a launcher (torchrun, accelerate launch) started, and leave them at the end.

    Yields:
        The device of this process: with several on CUDA, the one of its local number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()


def alike(model: nn.Module) -> None:
    """Give every process the weights of the first."""
    if world() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def agreed(number: int | None, device: torch.device) -> int | None:
    """What the first process says."""
    if world() == 1:
        return number
    said = torch.tensor([-1 if number is None else number], device=device)
    dist.broadcast(said, 0)
    return None if int(said) < 0 else int(said)


def together(device: torch.device) -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1, device=device))


def summed(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Numbers, each summed over processes."""
    if world() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(weights: Iterable[Tensor]) -> None:
    """Sum gradients over processes, in place. A weight that no process has a gradient for keeps none."""
    if world() == 1:
        return
    weights = list(weights)
    there = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=weights[0].device)
    dist.all_reduce(there)
    for weight, count in zip(weights, there.tolist(), strict=True):
        if count:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)


def require_room(batch: int) -> None:
    """Raise where there are more processes than rows of an update."""
    if batch < world():
        raise TrainingError(
            f"an update of {batch} rows was asked of {world()} processes: give at least one row to each (--batch)"
        )
