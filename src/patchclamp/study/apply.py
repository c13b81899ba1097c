"""Apply: act on what a map found. A circuit, or gates of one's own, made part of a checkpoint, with what else that changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.change import Folded, fold, side_effects, text_effects, write_checkpoint
from patchclamp.circuit import Circuit
from patchclamp.errors import GateError, PatchclampError, TaskError
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Gated, gated, nodes
from patchclamp.sites import Site
from patchclamp.tasks import Examples, load_task, task_names
from patchclamp.tasks._batch import Batch

TEXTS, LENGTH = 32, 48
"""How much text a model writes by itself, where none is given: rows and tokens."""
CAN = 0.75
"""Share of right answers from which on a model can do a task."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Gates that were asked for, ready to run or to fold."""

    parts: Gated
    gates: Float[Tensor, "1 1 1 part"]
    fallback: Fallback


@dataclass(frozen=True, eq=False)
class Applied:
    """What `apply` did.

    Args:
        folder: the new checkpoint.
        folded: gates, largest difference of its logits from the gated model's, whether biases were added.
        tasks: `side_effects`, the run's own task first.
        text: `text_effects`, with `source`.
        left_out: task -> why it is not in the table.
    """

    folder: Path
    folded: Folded
    tasks: pl.DataFrame
    text: Mapping[str, Any]
    left_out: Mapping[str, str]


def asked(
    model: Model, fit: Examples | None, keep: Circuit | None = None, scale: Mapping[str, float] | None = None, fallback: str | None = None
) -> Asked:  # fmt: skip
    """Gates: closed outside the circuit `keep`, and what `scale` says of single parts (its gates multiply those).

    Args:
        model: the model.
        fit: what means are learned on.
        keep: a circuit of heads and MLPs: every other head and MLP is closed.
        scale: part or pattern (`L3.h2`, `L*.mlp`, `L1.mlp.n7`, `L2.kv1.v`) -> gate.
        fallback: what a closed gate passes: "zero" or "mean" (over every token); by default mean for a circuit, else zero.

    Raises:
        GateError: nothing was asked for, or another fallback.
        SiteError: a part that the model does not have.
    """
    scale = scale or {}
    if keep is None and not scale:
        raise GateError("no gates were asked for: keep a circuit, or scale parts (L3.h2=0.5)")
    kind = fallback or ("mean" if keep is not None else "zero")
    if kind not in ("zero", "mean"):
        raise GateError(f"the fallback {kind!r} depends on the prompt and cannot act on any prompt: use zero or mean")
    labels: dict[Site, float] = {}
    if keep is not None:
        whole = nodes(model)
        if strange := [part for part in keep if part not in whole.index]:
            raise GateError(
                f"{strange[0]} is in the circuit and is no head or MLP of {model.name}: circuits of nodes can be kept"
            )
        labels = {whole.labels[number]: float(whole.labels[number] in keep) for number in whole.counted}
    for pattern, gate in scale.items():
        for site in gated(model, [pattern]).labels:
            labels[site] = labels.get(site, 1.0) * gate
    parts = Gated(model, sorted(labels))
    gates = parts.open()
    gates[0, 0, 0] = torch.tensor([labels[site] for site in parts.labels])
    return Asked(parts, gates, parts.fallback("zero" if kind == "zero" else "mean:all", fit=fit))


def apply(
    model: Model,
    own: Examples,
    want: Asked,
    out: str | Path,
    *,
    also: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    n: int = 64,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Applied:
    """Fold gates into the weights, measure what else changes, write the checkpoint.

    Args:
        model: the model that was mapped.
        own: prompts of the task that it was mapped on, that chose nothing: the confirm set.
        want: from `asked`.
        out: the new folder.
        also: other tasks, by name or file; by default every built-in one that the model can do.
        texts: plain text, a row each; by default what the model writes by itself.
        n: prompts of each other task.
        seed: of prompts, text and intervals.
        about: kept in the checkpoint's note.
        progress: told what is being done.

    Raises:
        PatchclampError: what `fold` and `write_checkpoint` refuse; nothing is written then.
    """
    told, out = progress or (lambda what: None), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PatchclampError(f"{out} is there already: choose another folder for the new checkpoint")
    prove = own.batch(list(range(min(8, len(own)))))
    told("folding gates into weights")
    folded = fold(want.parts, want.gates, want.fallback, prove)
    told("other tasks")
    others, left_out = tasks_of(model, also, own.task, n, seed)
    tasks = side_effects(model, folded.model, [own, *others], seed=seed)
    told("plain text")
    rows, source = (model.encode(list(texts)), "given") if texts else (own_text(model, seed), "written by the model itself")
    text = {**text_effects(model, folded.model, rows, seed=seed), "source": source}
    told("writing the checkpoint")
    note = {
        **(about or {}), "gates": folded.gates, "fallback": folded.fallback, "biases_added": folded.biases,
        "largest_difference_of_logits": folded.difference, "largest_logit": folded.scale, "side_effects": tasks.to_dicts(), "text": text,
    }  # fmt: skip
    return Applied(write_checkpoint(folded.model, out, note, prove), folded, tasks, text, left_out)


def tasks_of(model: Model, names: Sequence[str] | None, own: str, n: int, seed: int) -> tuple[list[Examples], dict[str, str]]:
    """Prompts of the tasks that are named, or of every other built-in task that the model can do; and why others are not there.

    Raises:
        TaskError: a task that was named does not fit.
    """
    found, left_out = list[Examples](), dict[str, str]()
    for name in names if names is not None else [name for name in task_names() if name != own]:
        try:
            examples = load_task(name).examples(model.tokenizer, n, seed)
        except TaskError as error:
            if names is not None:
                raise
            left_out[name] = str(error).partition(";")[0]
            continue
        if names is None:
            right = float(side_effects(model, model, [examples])["accuracy_before"][0])
            if right < CAN:
                left_out[name] = f"the model cannot do it ({right:.0%} right)"
                continue
        found.append(examples)
    return found, left_out


def own_text(model: Model, seed: int = 0) -> Batch:
    """What the model writes by itself at temperature 1, from its first token on.

    Raises:
        PatchclampError: the tokenizer knows no token that text begins with.
    """
    ids = [getattr(model.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    start = next((one for one in ids if one is not None), None)
    if start is None:
        raise PatchclampError(
            f"the tokenizer of {model.name} knows no token that text begins with: give plain text (--text FILE)"
        )
    made = model.generate(torch.full((TEXTS, 1), int(start)), max_new_tokens=LENGTH, temperature=1.0, seed=seed)
    return token_batch([[*prompt, *tokens] for prompt, tokens in zip(made.prompts, made.tokens, strict=True)])
