"""Identity and provenance of a study: what must be equal for a run to be the same, and what is only written down."""

import platform
import resource
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from patchclamp.models.model import Model
from patchclamp.models.offload import stored
from patchclamp.store import Run, digest, weights_hash
from patchclamp.store.record import ModelInfo, Provenance, TaskInfo
from patchclamp.study.plan import Plan
from patchclamp.tasks import Task
from patchclamp.tasks._split import Split

REVISIONS = {
    "nodes": 1,
    "exact": 1,
    "gradient": 1,
    "integrated": 1,
    "gating": 1,
    "discover": 1,
    "trust": 1,
    "relate": 2,
    "dynamic": 2,
}
"""Raised whenever a method comes to give other numbers, so that older runs are not taken for the same."""


def model_hash(model: Model) -> str:
    """Hash of the weights and the configuration, cached by file where the weights came from files unchanged."""
    folder = model.folder
    files = sorted(folder.glob("*.safetensors")) if folder is not None and model.loaded else []
    tensors, load = stored(model.hf)
    return weights_hash(tensors, model.hf.config.to_dict(), files, load)


def identity(model: Model, task: Task, plan: Plan, other: Model | None = None) -> str:
    """The digest of a run: weights, task, plan, revisions of the methods; and the weights of another model whose values are put in."""
    weights = "+".join(model_hash(one) for one in (model, other) if one is not None)
    return digest(weights, task.hash, plan, REVISIONS)


def _info(model: Model) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        family=model.family.name,
        layers=model.layers,
        heads=tuple(size.heads for size in model.anatomy.sizes),
        parameters=model.parameters,
        hash=model_hash(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def provenance(model: Model, task: Task, split: Split, plan: Plan, run: Run, other: Model | None = None) -> Provenance:
    """What is needed to get the same numbers again."""
    return Provenance(
        model=_info(model),
        task=TaskInfo(
            name=task.name,
            about=task.about,
            hash=task.hash,
            fit=len(split.fit),
            select=len(split.select),
            confirm=len(split.confirm),
            dropped=dict(split.fit.dropped),
            majority=split.confirm.majority,
        ),
        versions={"patchclamp": version("patchclamp"), "python": platform.python_version(), "torch": version("torch"),
                  "transformers": version("transformers")},
        device=str(model.device),
        seeds=tuple(plan.seed + k for k in range(plan.gating.seeds)),
        seconds=run.seconds,
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        digest=identity(model, task, plan, other),
        command=" ".join(map(shlex.quote, [Path(sys.argv[0]).name, *sys.argv[1:]])),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        other=None if other is None else _info(other),
    )  # fmt: skip
