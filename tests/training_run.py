"""A small training, and processes of their own that train, are killed or train together, for tests.

    python training_run.py kill OUT 3 9 12                  begun again and again, killed (-9) at these steps
    python training_run.py kill OUT w4                      killed while the checkpoint of step 4 is written
    python training_run.py together OUT COUNT [STOP] ...    by several processes; at STOP the first one gets Ctrl-C

Several such commands may follow each other, parted by "and". Each process is forked from this one, which has imported what they
need and has trained nothing itself.
"""

import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Clamp, Rows, Tokens, Trained, Training, checkpoint, held_out, train
from patchclamp.training.distributed import joined

STEPS = 24
PLAN = Training(STEPS, batch=6, rate=3e-3, warmup=5, save=4, evaluate=5, checkpoints=(7, 13), accumulate=2)

LINEAR = replace(PLAN, optimizer="sgd", rate=0.1)
"""Without AdamW, which makes steps of one size out of rounding where a gradient is 0 (of keys' biases)."""


def model(dropout: float, seed: int = 0) -> Model:
    """A small GPT-2, with dropout, so that what is drawn by chance must be the same too."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Model.load(GPT2LMHeadModel(config).eval())


def data() -> Tokens:
    """Rows of several lengths, of which the last ones are set aside; weights differ."""
    draw = torch.Generator().manual_seed(3)
    tokens, lengths = torch.randint(1, 20, (50, 12), generator=draw), torch.randint(3, 13, (50, 1), generator=draw)
    mask = torch.arange(12)[None] < lengths
    return Tokens(tokens, mask, mask * torch.rand(50, 12, generator=draw), seed=2, held=8)


@dataclass(frozen=True)
class Quiet(Clamp):
    """Halves what one head writes, and the gradient of the final norm."""

    strength: float = 0.5

    def edits(self, model: Model, step: int, rows: Rows):
        return {Site.parse("L0.h1.z"): lambda value, seen: value * self.strength * seen.mask[..., None]} if step % 2 else {}

    def gradients(self, model: Model, step: int) -> None:
        weight = model.hf.transformer.ln_f.weight
        if weight.grad is not None:
            weight.grad.mul_(self.strength)


def run(out: Path, plan: Training = PLAN, tick=None) -> Trained:
    """The whole training, or what is left of it; `LINEAR` without dropout, which is drawn by process."""
    rows = data()
    return train(
        model(0.0 if plan == LINEAR else 0.1), rows, plan, out, clamps=[Quiet()], measures=[held_out(rows, 8)], tick=tick
    )


def die_writing(step: int) -> None:
    """Kill this process in the middle of writing the checkpoint of a step."""
    write = checkpoint.save_file

    def half(moments, path, metadata):
        write(moments, path, metadata=metadata)
        if metadata["step"] == str(step):
            with Path(path).open("rb+") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half


def forked(act: Callable[[int], None]) -> tuple[int, int]:
    """Run `act` with the writing end of a pipe in a process of its own; its id, and the reading end."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    code = 1
    try:
        act(writing)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill(out: Path, at: str) -> None:
    """One process, killed at a step, or while a checkpoint is written."""
    writing = int(at[1:]) if at.startswith("w") else None

    def act(pipe: int) -> None:
        if writing is not None:
            die_writing(writing)
        run(out, tick=lambda done, of, numbers: os.write(pipe, bytes([done])))

    process, reading = forked(act)
    while told := os.read(reading, 1):
        if writing is None and told[0] >= int(at):
            os.kill(process, signal.SIGKILL)
            break
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == -signal.SIGKILL, f"the process that was to be killed at {at} left with {code}"


def together(out: Path, count: int, stop: int | None = None) -> None:
    """Several processes, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def tick(done: int, of: int, numbers: object) -> None:
        if done == stop:
            signal.raise_signal(signal.SIGINT)

    def act(rank: int) -> None:
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in shared.items()})
        with joined("cpu"), suppress(KeyboardInterrupt):
            run(out, LINEAR, tick)

    processes = [forked(lambda pipe, rank=rank: act(rank))[0] for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert codes == [0] * count, codes


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for words in " ".join(sys.argv[1:]).split(" and "):
        what, out, *rest = words.split()
        if what == "kill":
            for at in rest:
                kill(Path(out), at)
        else:
            together(Path(out), *map(int, rest))


if __name__ == "__main__":
    main()
