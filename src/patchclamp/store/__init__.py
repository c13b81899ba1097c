"""Runs on disk: a folder per run, from which a killed run resumes and the report is made.

::

    runs/0f3a9c21b7de/
      plan.json             the question
      manifest.json         finished steps and files with their SHA-256
      steps/                one result per step: JSON, Parquet, safetensors
      scores.parquet        the table of parts; toggles, curve and random.parquet beside it
      tensors.safetensors   attention patterns
      study.json            everything else that the report shows
      report.html

With `with Run.open(...) as run:` an exception takes away what this session wrote (nothing is left of a command that fails);
Ctrl-C, `kill` and `kill -9` leave finished steps, and opening the same run again goes on from them.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar, cast

from patchclamp.errors import StoreError
from patchclamp.files import TEMPORARY, check, write_atomically
from patchclamp.store import lock, manifest
from patchclamp.store.codec import decode, dumps, encode, plain
from patchclamp.store.files import read_encoded, write_encoded
from patchclamp.store.hashing import digest, weights_hash
from patchclamp.store.manifest import Manifest, Step
from patchclamp.store.record import Record

__all__ = ["Record", "Run", "RunInfo", "Watch", "digest", "load_plan", "load_record", "load_step", "runs", "weights_hash"]

P = ParamSpec("P")
T = TypeVar("T")
Event = Literal["begin", "done", "kept"]
Watch = Callable[[str, Event, float], None]
"""Told of every step: its name, that it began, was done, or was kept from before, and its seconds (0 at its beginning)."""


class Run:
    """A run that is being written; make it with `Run.open`, or `Run.unsaved` where nothing is to be kept."""

    def __init__(self, folder: Path | None, state: Manifest, watch: Watch | None) -> None:
        self.folder = folder
        self._state = self._before = state
        self._watch: Watch = watch or (lambda name, event, seconds: None)
        self._made: list[Path] = []
        self._lock: lock.Lock | None = None
        self._had_report = folder is not None and (folder / "report.html").exists()

    # --- opening and closing

    @classmethod
    def unsaved(cls, watch: Watch | None = None) -> "Run":
        """A run without a folder: steps are computed and not kept."""
        return cls(None, Manifest("", "", "", _now()), watch)

    @classmethod
    def open(
        cls, folder: Path | str | None, plan: Any, *, digest: str, task: str, model: str, watch: Watch | None = None
    ) -> "Run":
        """Open a run for writing: make its folder, or go on where it stopped.

        Args:
            folder: the run's folder; None: runs/ and the first 12 characters of the digest.
            plan: the question, a dataclass or mapping, kept as plan.json.
            digest: the question's identity (`digest`).
            task, model: names for lists of runs.
            watch: told of every step.

        Raises:
            StoreError: it cannot be written, is not empty and not a run, holds another question, is damaged, or is being written.
        """
        place = manifest.place_of(folder, digest)
        made = _make(place)
        try:
            held = lock.Lock(place)
        except BaseException:
            _remove(made)
            raise
        run = cls(place, Manifest(digest, task, model, _now()), watch)
        run._made, run._lock = made, held
        try:
            run._begin(plain(plan))
        except BaseException:
            held.release()
            _remove(made)
            raise
        return run

    def _begin(self, plan: Any) -> None:
        assert self.folder is not None
        others = [path.name for path in self.folder.iterdir() if path.name != lock.NAME and not path.name.endswith(TEMPORARY)]
        if (self.folder / manifest.NAME).is_file():
            found = Manifest.read(self.folder)
            if found.digest != self._state.digest:
                raise StoreError(
                    f"{self.folder} holds another run ({_difference(self.folder, found, plan)}): choose another --out"
                )
            if (self.folder / "plan.json").exists():
                check(self.folder / "plan.json", found.files["plan.json"])
            else:
                write_atomically(self.folder / "plan.json", dumps(plan).encode())
            self._state = self._before = found
        elif set(others) - {"plan.json"}:  # a run that was killed before its manifest has plan.json alone
            raise StoreError(f"{self.folder} is not empty and not a run (it has {sorted(others)[0]} in it): choose another --out")
        for left in self.folder.rglob(f".*{TEMPORARY}"):
            left.unlink()
        (self.folder / "steps").mkdir(exist_ok=True)
        if not self._state.files:
            self._state = self._state.with_files({"plan.json": write_atomically(self.folder / "plan.json", dumps(plan).encode())})
            self._state.write(self.folder)

    def close(self, failed: bool = False) -> None:
        """Let go of the run; `failed` takes away what was written since it was opened."""
        if self.folder is None or self._lock is None:
            return
        if failed:
            self._undo()
        self._lock.release()
        self._lock = None
        if failed:
            _remove(self._made)

    def _undo(self) -> None:
        assert self.folder is not None
        new = _listed(self._state) - _listed(self._before) | (set() if self._had_report else {"report.html"})
        for name in new:
            (self.folder / name).unlink(missing_ok=True)
        if self._before.files:  # what was written over is as good as what it replaced, and has a new hash
            replace(
                self._before,
                files={name: self._state.files[name] for name in self._before.files},
                steps={name: self._state.steps[name] for name in self._before.steps},
            ).write(self.folder)
            return
        (self.folder / manifest.NAME).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "steps", ignore_errors=True)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=isinstance(error, Exception) or (error is not None and not self._state.steps))

    # --- steps

    @property
    def seconds(self) -> dict[str, float]:
        """Finished steps, in order, with the seconds that each took when it was computed."""
        return {name: step.seconds for name, step in self._state.steps.items()}

    def step(self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)`, computed once in the life of the run and read back ever after.

        What comes back is what a resumed run would read, also the first time: numbers are bit for bit those of the
        function, tensors are on the CPU. The name stands for the arguments: they follow from the plan.

        Raises:
            StoreError: the result cannot be kept (see `patchclamp.store.codec`), or what was kept is damaged.
        """
        if not name.replace("-", "").replace("_", "").isalnum():
            raise StoreError(f"{name!r} cannot name a step: use letters, digits, - and _")
        known = self._state.steps.get(name)
        if self.folder is not None and known is not None and all((self.folder / file).exists() for file in known.files):
            files = {Path(file).name: hash for file, hash in known.files.items()}
            result: T = decode(read_encoded(self.folder / "steps", name, files))
            self._watch(name, "kept", known.seconds)
            return result
        self._watch(name, "begin", 0.0)
        start = time.perf_counter()
        encoded = encode(function(*args, **kwargs))
        spent = time.perf_counter() - start
        files: dict[str, str] = {}
        if self.folder is not None:
            written = write_encoded(self.folder / "steps", name, encoded)
            files = {f"steps/{file}": hash for file, hash in written.items()}
        self._change(self._state.with_step(name, Step(files, spent)))
        self._watch(name, "done", spent)
        return decode(encoded)

    def save(self, record: Record) -> None:
        """Keep the finished study: study.json, scores.parquet, tensors.safetensors; the run then counts as finished."""
        if self.folder is None:
            return
        encoded = encode(record)
        frames = {name: f"{name}.parquet" for name in encoded.frames}
        written = write_encoded(self.folder, "study", encoded, frames=frames, tensors="tensors.safetensors")
        self._change(replace(self._state.with_files(written), headline=record.headline, status="finished"))

    def finish(self, headline: str) -> None:
        """Count the run as finished: of a run that is its steps, and holds no study."""
        self._change(replace(self._state, headline=headline, status="finished"))

    def _change(self, state: Manifest) -> None:
        self._state = state
        if self.folder is not None:
            state.write(self.folder)


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
        raise StoreError(f"{place} is not finished ({len(state.steps)} steps are): run the same command again to go on with it")
    names = {name: hash for name, hash in state.files.items() if name not in ("plan.json", "report.html")}
    record = decode(read_encoded(place, "study", names))
    if not isinstance(record, Record):
        raise StoreError(f"{place}/study.json holds no study: choose another run")
    return record


def load_step(folder: Path | str, name: str) -> Any:
    """What a finished step of a run found; raises `StoreError` where the run has no such step, or a file is damaged."""
    place = Path(folder)
    known = Manifest.read(place).steps
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


def _listed(state: Manifest) -> set[str]:
    return set(state.files) | {file for step in state.steps.values() for file in step.files}


def _difference(folder: Path, found: Manifest, plan: Any) -> str:
    old = load_plan(folder)
    changed = [key for key in sorted({*old, *plan}) if old.get(key) != plan.get(key)] if isinstance(plan, dict) else []
    flat = {key: _apart(old.get(key), plan.get(key)) for key in changed}
    shown = ", ".join(
        f"{key}{name} {was!r:.60} there, {now!r:.60} here" for key, some in flat.items() for name, was, now in some[:3]
    )
    return shown or f"task {found.task}, model {found.model}, with other weights, task or methods"


def _apart(was: object, now: object) -> list[tuple[str, object, object]]:
    """What differs between two values of a plan: of mappings, which entries, however deep."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return [("", was, now)]
    old, new = cast(dict[str, object], was), cast(dict[str, object], now)
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [(f".{name}{rest}", *two) for name in changed for rest, *two in _apart(old.get(name), new.get(name))]  # pyright: ignore[reportReturnType]


def _make(folder: Path) -> list[Path]:
    """Make the folder, prove that it can be written, and return what was made, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{TEMPORARY}"
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        _remove(missing)
        raise StoreError(f"{folder} cannot be written ({error.strerror or error}): give another folder with --out") from None
    return missing


def _remove(folders: list[Path]) -> None:
    """Remove what was made, as far as it is empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
