"""Notes: what a method has to say beside its numbers (which rules were put in where, what gap is left), for the scores' `about`."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_NOTES: ContextVar[dict[str, Any] | None] = ContextVar("patchclamp_notes", default=None)


@contextmanager
def noting() -> Generator[Mapping[str, Any]]:
    """While open, what methods of this thread note is collected; yields what there is so far."""
    found: dict[str, Any] = {}
    token = _NOTES.set(found)
    try:
        yield found
    finally:
        _NOTES.reset(token)


def note(name: str, value: Any) -> None:
    """Leave a note where somebody collects them; of numbers noted several times (batch by batch) the largest stays."""
    notes = _NOTES.get()
    if notes is None:
        return
    before = notes.get(name)
    numbers = isinstance(before, int | float) and isinstance(value, int | float)
    notes[name] = max(before, value) if numbers and before is not None else value
