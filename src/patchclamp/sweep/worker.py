"""Worker: takes up one job of a sweep after another, and keeps the last model that it loaded."""

import traceback
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from patchclamp.errors import PatchclampError
from patchclamp.store import Run
from patchclamp.sweep.case import Case
from patchclamp.sweep.place import Files, Place

if TYPE_CHECKING:
    from patchclamp.models.model import Model

Kind = Literal["identify", "piece", "finish"]


@dataclass(frozen=True)
class Job:
    """Something to do for a case: find its digest, score a piece of its examples, or carry out its plan.

    Args:
        number: of the case in its sweep.
        kind: what is to be done.
        piece: which piece, and of how many (0 of 1: the plan is not divided).
    """

    number: int
    kind: Kind
    piece: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Outcome:
    """What came of a job: a value, or an error in words."""

    value: Any = None
    error: str = ""


@dataclass
class Worker:
    """One process's worth of work. `threads`: of torch, where workers share a machine; None: as it is."""

    place: Place
    threads: int | None = None
    _held: "tuple[str, Model] | None" = field(default=None, init=False)

    def ready(self) -> str:
        """Prove that work can begin here: import what is needed, set the threads."""
        import torch

        for name in ("report", "study", "sweep.pieces"):
            import_module(f"patchclamp.{name}")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return "ready"

    def take(self, job: Job, case: Case, *given: Any) -> Outcome:
        """Do a job. Whatever goes wrong with it is its outcome: others go on."""
        try:
            if job.kind == "identify":
                return Outcome(self.identify(case, *given))
            return Outcome(self.piece(case, job.piece, *given) if job.kind == "piece" else self.finish(case, *given))
        except PatchclampError as error:
            return Outcome(error=f"{type(error).__name__}: {error}")
        except Exception as error:  # a bug, or the machine's end: named with its place
            at = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome(error=f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno})")

    def identify(self, case: Case, shards: int) -> tuple[str, int]:
        """The digest of the case's run, and into how many pieces its examples go, `shards` at most."""
        from patchclamp.study.provenance import identity
        from patchclamp.sweep.pieces import batches_of

        task, model = case.load_task(), self._model(case)
        pieces = min(shards, batches_of(model, task, case)) if shards > 1 else 1
        return identity(model, task, case.plan), pieces

    def piece(self, case: Case, piece: tuple[int, int], digest: str) -> Files | None:
        """Score a piece of the examples and keep the answers."""
        from patchclamp.sweep.pieces import answers

        task, model = case.load_task(), self._model(case)
        with self.place.landing(self.place.piece(digest, *piece)) as landing:
            asked = {"plan": case.plan, "steps": case.steps, "piece": piece}
            named = f"{digest}:{piece[0]}/{piece[1]}:{','.join(sorted(case.steps))}"
            with Run.open(landing.folder, asked, digest=named, task=task.name, model=model.name) as run:
                run.step("answers", answers, model, task, case, *piece)
            return landing.files()

    def finish(self, case: Case, digest: str, known: dict[str, Any]) -> Files | None:
        """Carry out the plan, in its run, with a report; what is `known` from pieces is not computed again."""
        from patchclamp.report import write_report
        from patchclamp.study import begin, carry_out, open_run
        from patchclamp.sweep.pieces import noting

        task, model = case.load_task(), self._model(case)
        with self.place.landing(self.place.run(digest)) as landing:
            with open_run(landing.folder, model, task, case.plan, source=case.source) as run:
                work = begin(model, task, case.plan, run)
                if known:
                    work.parts = noting(work.parts, known)
                carry_out(work, case.steps)
                write_report(landing.folder)
            return landing.files()

    def _model(self, case: Case) -> "Model":
        if self._held is None or self._held[0] != case.weights:
            self._held = None  # the old weights go before the new ones come
            self._held = (case.weights, case.load_model())
        return self._held[1]
