"""Runs as they lie on disk: which there are, what was asked, and what was found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from patchclamp.errors import StoreError
from patchclamp.files import check
from patchclamp.store import lock, manifest
from patchclamp.store.codec import decode
from patchclamp.store.files import read_encoded
from patchclamp.store.manifest import Manifest
from patchclamp.store.record import Record


@dataclass(frozen=True)
class RunInfo:
    """A line of a list of runs. `status`: finished, running, unfinished (interrupted: it resumes) or damaged."""

    folder: Path
    name: str
    task: str
    model: str
    date: str
    status: Literal["finished", "running", "unfinished", "damaged"]
    headline: str


def runs(folder: Path | str = "runs") -> list[RunInfo]:
    """The runs in `folder` (or the one that it is), newest first."""
    root = Path(folder)
    places = [root] if (root / manifest.NAME).is_file() else sorted(path.parent for path in root.glob(f"*/{manifest.NAME}"))
    found = [_info(place) for place in places]
    return sorted(found, key=lambda info: info.date, reverse=True)


def load_record(folder: Path | str) -> Record:
    """The finished study of a run; raises `StoreError` where it is not finished or a file is damaged."""
    place = Path(folder)
    state = Manifest.read(place)
    if "study.json" not in state.files and state.status == "finished":
        raise StoreError(f"{place} holds a {state.task}, which is no map of one task: choose a run of `patchclamp map`")
    if "study.json" not in state.files:
        raise StoreError(f"{place} is not finished ({len(state.done)} steps are): run the same command again to go on with it")
    names = {name: hash for name, hash in state.files.items() if name not in ("plan.json", "report.html")}
    record = decode(read_encoded(place, "study", names))
    if not isinstance(record, Record):
        raise StoreError(f"{place}/study.json holds no study: choose another run")
    return record


def load_step(folder: Path | str, name: str) -> Any:
    """What a finished step of a run found; raises `StoreError` where the run has no such step, or a file is damaged."""
    place = Path(folder)
    known = Manifest.read(place).done
    if name not in known:
        raise StoreError(f"{place} has not done {name!r}: its steps are {', '.join(known) or 'none'}")
    return decode(read_encoded(place / "steps", name, {Path(file).name: hash for file, hash in known[name].files.items()}))


def load_plan(folder: Path | str) -> dict[str, Any]:
    """The question of a run, as plain JSON."""
    place = Path(folder)
    check(place / "plan.json", Manifest.read(place).files["plan.json"])
    return json.loads((place / "plan.json").read_text())


def _info(place: Path) -> RunInfo:
    try:
        state = Manifest.read(place)
    except StoreError:
        return RunInfo(place, place.name, "", "", "", "damaged", "")
    status = "running" if lock.is_locked(place) else "finished" if state.status == "finished" else "unfinished"
    return RunInfo(place, place.name, state.task, state.model, state.created, status, state.headline)
