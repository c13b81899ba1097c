"""Place: where a sweep's results go, whether or not whoever computes them can see it.

A worker that sees the folder writes its run there, through the store. One on another host writes into a folder of its own and
gives its files back, and they are put in place under a name of their own that is then changed in one step.
"""

import shutil
import tempfile
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchclamp.errors import StoreError, SweepError
from patchclamp.files import write_atomically
from patchclamp.store import Run
from patchclamp.store.lock import NAME as LOCK
from patchclamp.store.lock import Lock, is_locked
from patchclamp.store.manifest import Manifest
from patchclamp.study import FINISHED

Files = Mapping[str, bytes]
"""A run's files by their names in its folder."""
PIECES, LANDING = ".pieces", ".landing"
PATIENCE = 30.0  # seconds that a dead worker's lock may take to be given back


@dataclass(frozen=True)
class Place:
    """A folder for results; `mark` names a file in it, which only who shares the folder can see."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def open(self) -> None:
        """Make the folder and mark it; raises `SweepError` where it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._marked.write_text("a sweep is running\n")
        except OSError as error:
            raise SweepError(
                f"{self.folder} cannot be written ({error.strerror or error}): give another folder with --out"
            ) from None

    def close(self) -> None:
        """Take the mark away, and whatever is empty."""
        self._marked.unlink(missing_ok=True)
        for folder in (self.folder / PIECES, self.folder / LANDING, self.folder):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    @property
    def _marked(self) -> Path:
        return self.folder / f".sweep-{self.mark}"

    def run(self, digest: str) -> Path:
        """Where the run of this digest lies."""
        return self.folder / digest[:12]

    def piece(self, digest: str, number: int, of: int) -> Path:
        """Where a piece of it lies until the run is finished."""
        return self.folder / PIECES / digest[:12] / f"{number}-of-{of}"

    @contextmanager
    def landing(self, target: Path) -> Generator["Landing"]:
        """A folder to write a run into: `target` itself where it can be seen from here, else one that is shipped."""
        if self._marked.is_file():
            wait_until_free(target)
            yield Landing(target, shipped=False)
            return
        with tempfile.TemporaryDirectory(prefix="patchclamp-") as own:
            yield Landing(Path(own) / target.name, shipped=True)


@dataclass(frozen=True)
class Landing:
    """The folder that is written, and whether its files have to be given back."""

    folder: Path
    shipped: bool

    def files(self) -> Files | None:
        """The files to give back; None where they are in place already."""
        if not self.shipped:
            return None
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name != LOCK)
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}


def wait_until_free(folder: Path, patience: float = PATIENCE) -> None:
    """A worker that was killed gives its lock back when the system has ended it, which may take a moment."""
    until = time.monotonic() + patience
    while is_locked(folder) and time.monotonic() < until:
        time.sleep(0.1)


def put_in_place(folder: Path, files: Files) -> None:
    """Files that came from elsewhere, as the run `folder`: whole or not at all. An unfinished run there makes room.

    Raises:
        StoreError: it cannot be written, or another process writes it.
    """
    landed = folder.parent / LANDING / folder.name
    shutil.rmtree(landed, ignore_errors=True)
    try:
        for name, body in files.items():
            (landed / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(landed / name, body)
        if folder.exists():
            held, old = Lock(folder), landed.with_name(f"{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
            landed.replace(folder)
            shutil.rmtree(old)
            held.release()
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            landed.replace(folder)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error.strerror or error}): make room, or give another --out") from None
    finally:
        shutil.rmtree(landed, ignore_errors=True)


def is_finished(folder: Path, digest: str, steps: tuple[str, ...]) -> bool:
    """Whether the run of this digest lies there with all of these steps; raises `StoreError` where it is damaged."""
    if not (folder / "manifest.json").is_file():
        return False
    state = Manifest.read(folder)
    done = {step for name, step in FINISHED.items() if name in state.steps}
    done |= {"attribute"} if any(name.startswith("attribution-") for name in state.steps) else set[str]()
    return state.digest == digest and state.status == "finished" and set(steps) <= done


def read_answers(folders: list[Path]) -> dict[str, Any]:
    """What finished pieces have noted; raises `StoreError` where one is not there or damaged."""
    found: dict[str, Any] = {}
    for folder in folders:
        state = Manifest.read(folder)
        with Run.open(folder, {}, digest=state.digest, task=state.task, model=state.model) as run:
            found |= run.step("answers", _missing, folder)
    return found


def _missing(folder: Path) -> dict[str, Any]:
    raise StoreError(f"{folder} is not finished: delete it and run the same command again")
