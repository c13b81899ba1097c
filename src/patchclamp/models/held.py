"""Changes of process-wide state that several sessions want at once: made by the first, undone by the last, in any thread."""

import threading
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager

Undo = Callable[[], None]


class Holder:
    """Counts who holds each change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Hashable, tuple[int, Undo]] = {}

    @contextmanager
    def hold(self, key: Hashable, make: Callable[[], Undo]) -> Generator[None, None, None]:
        """While open, the change `make` is made; it returns what undoes it."""
        with self._lock:
            count, undo = self._held[key] if key in self._held else (0, make())
            self._held[key] = (count + 1, undo)
        try:
            yield
        finally:
            with self._lock:
                count, undo = self._held.pop(key)
                if count > 1:
                    self._held[key] = (count - 1, undo)
                else:
                    undo()


HOLDER = Holder()
"""The one holder of this process."""
