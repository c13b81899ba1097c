"""Where the checkpoints of a training lie: a run of ours, a folder of folders, or revisions on the hub."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from patchclamp.errors import ModelError, TrainingError

_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter)[-_]?0*(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"0*(\d+)$")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """One model of a training.

    Args:
        step: updates behind it.
        model: a folder, or a hub name.
        revision: of the hub model.
    """

    step: int
    model: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"step {self.step}"


def checkpoints(
    source: str | Path, *, revisions: Sequence[str] | None = None, steps: Iterable[int] | None = None, count: int | None = None
) -> tuple[Checkpoint, ...]:
    """The checkpoints of a training, in order.

    Args:
        source: a run of `patchclamp train` (its `checkpoints/step-N`), a folder with one folder per checkpoint whose name holds
            the step ("checkpoint-500", "step1000", "step1000-tokens4B", "500"), or a hub name whose branches or tags do.
        revisions: of a hub model; by default all that name a step.
        steps: only these.
        count: at most so many, evenly spaced in log(1 + step), first and last among them.

    Raises:
        TrainingError: no checkpoints there, a revision without a step in its name, or a step that there is not.
        ModelError: the hub cannot be asked.
    """
    folder = Path(source).expanduser()
    found = _local(folder) if folder.is_dir() else _hub(str(source), revisions)
    if folder.is_dir() and revisions:
        raise TrainingError(f"{source} is a folder, which has no revisions: choose with steps, or give a hub name")
    if steps is not None:
        wanted = set(steps)
        if missing := sorted(wanted - {one.step for one in found}):
            raise TrainingError(f"{source} has no checkpoint at step {missing[0]}: it has {_listed(found)}")
        found = [one for one in found if one.step in wanted]
    return tuple(found if count is None else _thinned(found, count))


def step_of(name: str) -> int | None:
    """The step that the name of a checkpoint tells, or None."""
    told = _STEP.search(name) or _NUMBER.search(name)
    return int(told.group(1)) if told else None


def _local(folder: Path) -> list[Checkpoint]:
    rooms = [folder / "checkpoints"] if (folder / "checkpoints").is_dir() else [folder]
    places = [path.parent for room in rooms for path in room.glob("*/config.json") if not path.parent.name.startswith(".")]
    found = sorted(Checkpoint(step, str(place)) for place in places if (step := step_of(place.name)) is not None)
    if not found:
        raise TrainingError(
            f"{folder} holds no checkpoints: there should be folders in it (or in its checkpoints/) whose names hold a step and "
            "which hold a config.json"
        )
    _each_once(found, folder)
    return found


def _hub(name: str, revisions: Sequence[str] | None) -> list[Checkpoint]:
    if name.startswith("zoo/"):
        raise TrainingError(
            f"{name} is a finished model without checkpoints: give the run of a training, a folder of them, or a hub name"
        )
    named = list(revisions) if revisions else _listed_revisions(name)
    found: list[Checkpoint] = []
    for revision in named:
        step = step_of(revision)
        if step is None and revisions:
            raise TrainingError(f"the revision {revision!r} of {name} does not say its step: give names such as step1000")
        if step is not None:
            found.append(Checkpoint(step, name, revision))
    if not found:
        raise TrainingError(f"no branch or tag of {name} names a step: give revisions such as step1000")
    found.sort()
    _each_once(found, name)
    return found


def _listed_revisions(name: str) -> list[str]:
    """Branches and tags of a hub model that name a step."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # of what the hub is asked with  # pyright: ignore[reportPrivateImportUsage]
    )

    try:
        refs = HfApi().list_repo_refs(name)
    except HFValidationError:
        raise ModelError(
            f"there is no folder {name}, and it is no hub name: give a run's folder, or a name such as EleutherAI/pythia-70m"
        ) from None
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"the checkpoints of {name} cannot be listed ({type(error).__name__}): give a folder, or revisions by name"
        ) from None
    return [ref.name for ref in (*refs.branches, *refs.tags) if _STEP.search(ref.name)]


def _each_once(found: Sequence[Checkpoint], source: str | Path) -> None:
    for one, other in pairwise(found):
        if one.step == other.step:
            where = [checkpoint.revision or checkpoint.model for checkpoint in (one, other)]
            raise TrainingError(
                f"{source} has two checkpoints of step {one.step} ({where[0]}, {where[1]}): give revisions or another folder"
            )


def _thinned(found: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    if count < 2:
        raise TrainingError(f"{count} checkpoints were asked: development needs at least 2")
    if count >= len(found):
        return list(found)
    place = np.log1p([one.step for one in found])
    wanted = np.linspace(place[0], place[-1], count)
    return [found[i] for i in sorted({int(np.abs(place - at).argmin()) for at in wanted})]


def _listed(found: Sequence[Checkpoint]) -> str:
    steps = [str(one.step) for one in found]
    return ", ".join(steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-3:]])
