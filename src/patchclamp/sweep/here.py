"""Here: one worker, in this process."""

from collections.abc import Sequence
from typing import Any

from patchclamp.sweep.case import Case
from patchclamp.sweep.drive import Ended
from patchclamp.sweep.place import Place
from patchclamp.sweep.worker import Job, Worker


class Here:
    """A `Pool` of one, which works while one waits for it."""

    def __init__(self, place: Place) -> None:
        self.worker = Worker(place)
        self._held: str | None = None
        self._job: tuple[Job, Case, tuple[Any, ...]] | None = None

    def free(self) -> Sequence[tuple[int, str | None]]:
        return [] if self._job else [(0, self._held)]

    def start(self, worker: int, job: Job, case: Case, *given: Any) -> None:
        self._job = (job, case, given)

    def next(self) -> Ended | None:
        if self._job is None:
            return None
        (job, case, given), self._job = self._job, None
        self._held = case.weights
        return Ended(job, self.worker.take(job, case, *given))

    def close(self) -> None:
        self._job = None
