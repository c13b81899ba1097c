"""A run that is being written: its lock, its finished steps, and what is taken away where it fails."""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar, cast

from patchclamp.errors import StoreError
from patchclamp.files import TEMPORARY, check, write_atomically
from patchclamp.store import lock, manifest
from patchclamp.store.codec import Encoded, decode, dumps, encode, plain
from patchclamp.store.files import read_encoded, write_encoded
from patchclamp.store.listing import load_plan
from patchclamp.store.manifest import PIECE, Manifest, Step
from patchclamp.store.record import Record

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
        self._unlink(new)
        if self._before.files:  # what was written over is as good as what it replaced, and has a new hash
            replace(
                self._before,
                files={name: self._state.files[name] for name in self._before.files},
                steps={name: step for name, step in self._state.steps.items() if name in self._before.steps},
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
        return {name: step.seconds for name, step in self._state.done.items()}

    def step(self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)`, computed once in the life of the run and read back ever after.

        What comes back is what a resumed run would read, also the first time: numbers are bit for bit those of the
        function, tensors are on the CPU. The name stands for the arguments: they follow from the plan.

        Raises:
            StoreError: the result cannot be kept (see `patchclamp.store.codec`), or what was kept is damaged.
        """
        if not name.replace("-", "").replace("_", "").isalnum():
            raise StoreError(f"{name!r} cannot name a step: use letters, digits, - and _")
        if (known := self._known(name)) is not None:
            result: T = self._read(name, known)
            self._watch(name, "kept", known.seconds)
            return result
        self._watch(name, "begin", 0.0)
        encoded, spent = self._computed(name, function, *args, **kwargs)
        pieces = self._pieces(name)
        self._change(replace(self._state, steps={key: step for key, step in self._state.steps.items() if key not in pieces}))
        for piece in pieces.values():
            self._unlink(piece.files)
        self._watch(name, "done", spent)
        return decode(encoded)

    def piece(self, step: str, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A piece of a long step that is being computed: kept until that step is done, so that a run which is cut off within the
        step goes on behind the piece. Else as `step`; nobody is told of it.
        """
        key = f"{step}{PIECE}{name}"
        if (known := self._known(key)) is not None:
            return self._read(key, known)
        encoded, _ = self._computed(key, function, *args, **kwargs)
        return decode(encoded)

    def _known(self, key: str) -> Step | None:
        """A finished step or piece whose files are there."""
        known = self._state.steps.get(key)
        return (
            known
            if self.folder is not None and known is not None and all((self.folder / file).exists() for file in known.files)
            else None
        )

    def _pieces(self, step: str) -> dict[str, Step]:
        return {key: piece for key, piece in self._state.steps.items() if key.startswith(step + PIECE)}

    def _read(self, key: str, known: Step) -> Any:
        assert self.folder is not None
        return decode(read_encoded(self.folder / "steps", key, {Path(file).name: hash for file, hash in known.files.items()}))

    def _computed(self, key: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[Encoded, float]:
        """A result as it is kept, written down, and the seconds that it took, with those of pieces from before."""
        start, before = time.perf_counter(), sum(piece.seconds for piece in self._pieces(key).values())
        encoded = encode(function(*args, **kwargs))
        spent = before + time.perf_counter() - start
        written = {} if self.folder is None else write_encoded(self.folder / "steps", key, encoded)
        self._change(self._state.with_step(key, Step({f"steps/{file}": hash for file, hash in written.items()}, spent)))
        return encoded, spent

    def _unlink(self, files: Iterable[str]) -> None:
        for name in files:
            if self.folder is not None:
                (self.folder / name).unlink(missing_ok=True)

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
