"""Drive: which job goes to which worker, what is not done again, what is tried again; here or anywhere."""

import shutil
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from patchclamp.errors import PatchclampError
from patchclamp.store import load_record
from patchclamp.sweep.case import Case
from patchclamp.sweep.place import PIECES, Place, is_finished, put_in_place, read_answers
from patchclamp.sweep.rows import Row, row_of
from patchclamp.sweep.worker import Job, Outcome

TRIES = 3
"""How often a job is begun whose worker dies."""
Progress = Callable[[Row, int, int], None]
"""Told each plan as it ends: its row, how many have ended, how many there are."""


@dataclass(frozen=True)
class Ended:
    """A job that has ended: with its outcome, or None where its worker has died."""

    job: Job
    outcome: Outcome | None


@runtime_checkable
class Pool(Protocol):
    """Workers, wherever they are."""

    def free(self) -> Sequence[tuple[int, str | None]]:
        """Workers that have nothing to do, each with what model it holds (`Case.weights`)."""
        ...

    def start(self, worker: int, job: Job, case: Case, *given: Any) -> None:
        """Give a job to a free worker."""
        ...

    def next(self) -> Ended | None:
        """Wait until a job has ended, or (None) until there is another free worker."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


@dataclass
class Drive:
    """A sweep while it runs."""

    cases: Sequence[Case]
    place: Place
    pool: Pool
    shards: int
    told: Progress
    rows: dict[int, Row] = field(default_factory=dict[int, Row])
    waiting: deque[Job] = field(default_factory=deque[Job])
    running: list[Job] = field(default_factory=list[Job])
    digests: dict[int, str] = field(default_factory=dict[int, str])
    behind: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """By a digest that is being worked on: further cases of the same question."""
    pieces: dict[int, list[Path]] = field(default_factory=dict[int, list[Path]])
    left: Counter[int] = field(default_factory=Counter[int])
    """Pieces of a case that have not ended."""
    tries: Counter[Job] = field(default_factory=Counter[Job])

    def run(self) -> tuple[Row, ...]:
        """Until every case has its row."""
        self.waiting.extend(Job(number, "identify") for number in range(len(self.cases)))
        while self.waiting or self.running:
            for worker, held in self.pool.free():
                job = self._choose(held)
                if job is not None:
                    self._start(worker, job)
            ended = self.pool.next()
            if ended is not None:
                self.running.remove(ended.job)
                self._after(ended)
        return self.table()

    def table(self) -> tuple[Row, ...]:
        """A row per case, also of those that have none yet."""
        return tuple(self.rows.get(number) or Row(case, "waiting") for number, case in enumerate(self.cases))

    def _choose(self, held: str | None) -> Job | None:
        """The job for a worker that holds this model: one of that model; else of one that nobody is loading; else any."""
        busy = {self.cases[job.number].weights for job in self.running}
        wishes: tuple[Callable[[str], bool], ...] = (lambda w: w == held, lambda w: w not in busy, lambda w: True)
        for wish in wishes:
            for job in self.waiting:
                if wish(self.cases[job.number].weights):
                    self.waiting.remove(job)
                    return job
        return None

    def _start(self, worker: int, job: Job) -> None:
        case, digest = self.cases[job.number], self.digests.get(job.number, "")
        self.tries[job] += 1
        given: tuple[Any, ...] = (self.shards,) if job.kind == "identify" else (digest,)
        if job.kind == "finish":
            try:
                given = (digest, read_answers(self.pieces.get(job.number, [])))
            except PatchclampError as error:
                self._fail(job.number, str(error))
                return
        self.running.append(job)
        self.pool.start(worker, job, case, *given)

    def _after(self, ended: Ended) -> None:
        job, outcome = ended.job, ended.outcome
        if job.number in self.rows:
            return  # another piece of the same plan has failed
        if outcome is None:
            if self.tries[job] < TRIES:
                self.waiting.appendleft(job)
            else:
                self._fail(
                    job.number,
                    f"WorkerDied: {TRIES} workers died while they did this (out of memory?): its finished steps are kept",
                )
        elif outcome.error:
            self._fail(job.number, outcome.error)
        else:
            try:
                {"identify": self._identified, "piece": self._pieced, "finish": self._finished}[job.kind](job, outcome.value)
            except PatchclampError as error:
                self._fail(job.number, f"{type(error).__name__}: {error}")

    def _identified(self, job: Job, value: tuple[str, int]) -> None:
        digest, pieces = value
        self.digests[job.number] = digest
        if digest in self.behind:  # the same question under another name is being worked on
            self.behind[digest].append(job.number)
            return
        if is_finished(self.place.run(digest), digest, self.cases[job.number].steps):
            self._end(job.number, "kept")
            return
        self.behind[digest] = []
        jobs = [Job(job.number, "piece", (number, pieces)) for number in range(pieces)] if pieces > 1 else []
        self.pieces[job.number] = [self.place.piece(digest, *one.piece) for one in jobs]
        self.left[job.number] = len(jobs)
        self.waiting.extendleft(reversed(jobs or [Job(job.number, "finish")]))

    def _pieced(self, job: Job, files: Any) -> None:
        if files is not None:
            put_in_place(self.place.piece(self.digests[job.number], *job.piece), files)
        self.left[job.number] -= 1
        if not self.left[job.number]:
            self.waiting.appendleft(Job(job.number, "finish"))

    def _finished(self, job: Job, files: Any) -> None:
        digest = self.digests[job.number]
        if files is not None:
            put_in_place(self.place.run(digest), files)
        self._end(job.number, "done")
        shutil.rmtree(self.place.folder / PIECES / digest[:12], ignore_errors=True)

    def _end(self, number: int, state: Any) -> None:
        digest = self.digests[number]
        folder = self.place.run(digest)
        self._say(number, row_of(self.cases[number], state, digest, folder, load_record(folder)))

    def _fail(self, number: int, error: str) -> None:
        for job in [job for job in self.waiting if job.number == number]:
            self.waiting.remove(job)
        self._say(number, Row(self.cases[number], "failed", self.digests.get(number, ""), error=error))

    def _say(self, number: int, row: Row) -> None:
        self.rows[number] = row
        for other in self.behind.pop(row.digest, []):
            self.waiting.appendleft(Job(other, "identify"))
        self.told(row, len(self.rows), len(self.cases))
