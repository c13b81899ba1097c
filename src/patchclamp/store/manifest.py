"""The manifest of a run: which steps and files are finished, with their hashes, under a hash of its own."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from patchclamp.errors import StoreError
from patchclamp.files import write_atomically
from patchclamp.store.codec import dumps

NAME = "manifest.json"
FORMAT = 1
PIECE = "."
"""Between the names of a step that is not done and of a finished piece of it."""


@dataclass(frozen=True)
class Step:
    """A finished step: its files with their SHA-256, how long it took in seconds."""

    files: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Manifest:
    """What is finished of a run.

    Args:
        digest: the identity of the question.
        task, model: what it is about, for lists of runs.
        created: when it began, ISO 8601.
        steps: finished steps in the order in which they finished, and finished pieces (STEP.PIECE) of one that is not.
        files: other files with their SHA-256.
        headline: what was found, once the study is kept.
        status: "unfinished" or "finished".
    """

    digest: str
    task: str
    model: str
    created: str
    steps: Mapping[str, Step] = field(default_factory=dict[str, Step])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    headline: str = ""
    status: str = "unfinished"

    @property
    def done(self) -> Mapping[str, Step]:
        """Finished steps, without pieces of those that are not."""
        return {name: step for name, step in self.steps.items() if PIECE not in name}

    def with_step(self, name: str, step: Step) -> "Manifest":
        return replace(self, steps={**self.steps, name: step})

    def with_files(self, files: Mapping[str, str]) -> "Manifest":
        return replace(self, files={**self.files, **files})

    def write(self, folder: Path) -> None:
        body: dict[str, Any] = {"format": FORMAT, **vars(self), "steps": {name: vars(step) for name, step in self.steps.items()}}
        write_atomically(folder / NAME, dumps({**body, "sha256": _hash(body)}).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises `StoreError` where the folder is no run, was written by a newer version, or its manifest is damaged."""
        path = folder / NAME
        if not path.is_file():
            raise StoreError(f"{folder} is not a run: there is no {NAME} in it. `patchclamp runs` lists the runs there are")
        try:
            body: dict[str, Any] = json.loads(path.read_text())
            wanted = body.pop("sha256")
            intact = wanted == _hash(body)
        except (ValueError, KeyError, AttributeError, TypeError):
            intact, body = False, {}
        if not intact:
            raise StoreError(f"{path} is damaged: delete the folder {folder}, or give another one with --out, and run again")
        if body.pop("format") != FORMAT:
            raise StoreError(
                f"{folder} was written by another version of Patchclamp: read it with that version, or choose another --out"
            )
        body["steps"] = {name: Step(**step) for name, step in body["steps"].items()}
        return cls(**body)


def place_of(folder: Path | str | None, digest: str) -> Path:
    """A run's folder: the one given, else runs/ and the first 12 characters of the question's digest."""
    return Path(folder) if folder is not None else Path("runs") / digest[:12]


def finished(folder: Path, digest: str) -> tuple[frozenset[str], str]:
    """The finished steps of the question's run in `folder`, and whether it is "new", "unfinished" or "finished". Only read.

    Raises:
        StoreError: the folder holds another question's run, something that is no run, or a damaged manifest.
    """
    if not (folder / NAME).is_file():
        if folder.is_file() or (
            folder.is_dir() and {path.name for path in folder.iterdir() if path.name[0] != "."} - {"plan.json", "steps"}
        ):
            raise StoreError(f"{folder} is not a run's folder, and not empty: choose another --out")
        return frozenset(), "new"
    state = Manifest.read(folder)
    if state.digest != digest:
        raise StoreError(f"{folder} holds another run (of {state.task} on {state.model}): choose another --out")
    steps = {name for name, step in state.steps.items() if all((folder / file).exists() for file in step.files)}
    return frozenset(steps), state.status


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
