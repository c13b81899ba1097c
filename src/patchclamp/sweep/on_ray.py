"""On Ray: workers as actors that keep the model they hold; one that dies is replaced, and its job goes back to the queue.

Ray's own retries are off: an actor that is started again has lost its model, and which job is to be tried again, and how
often, is for the sweep to say.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from patchclamp.errors import SweepError
from patchclamp.sweep.case import Case
from patchclamp.sweep.drive import Ended
from patchclamp.sweep.place import Place
from patchclamp.sweep.worker import Job, Worker

STARTING = 300.0
"""Seconds in which some worker must have started where none is running: a cluster may have to grow first."""
STORE = 200 << 20
"""Bytes of the object store of a cluster that is started here: only files and answers of pieces pass through it."""


class OnRay:
    """A `Pool` of Ray actors.

    Args:
        place: where results go.
        address: of a cluster; None: one is started here.
        workers: how many; None: as many as the cluster has room for.
        cpus, gpus: of each worker.
        most: no more workers than this have anything to do.

    Raises:
        SweepError: Ray is not installed, the cluster cannot be reached, or it has no room for one worker.
    """

    def __init__(self, place: Place, address: str | None, workers: int | None, cpus: int, gpus: float | None, most: int) -> None:
        self._ray = ray = _ray()
        self._mine = not ray.is_initialized()
        if self._mine:
            _connect(ray, address, workers, cpus)
        try:
            have = ray.cluster_resources()
            gpus = gpus if gpus is not None else float(have.get("GPU", 0) > 0)
            room = room_for(have, cpus, gpus)
            if not room:
                raise SweepError(
                    f"a worker of {cpus} processors and {gpus:g} GPUs was asked for, and the cluster has {have.get('CPU', 0):g} and "
                    f"{have.get('GPU', 0):g}: ask for less with --cpus and --gpus, or give a larger cluster"
                )
        except BaseException:
            self.close()
            raise
        self._make = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._given = (place, cpus)
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        self._running: dict[Any, tuple[int, Job]] = {}
        self._held: dict[int, str | None] = {}
        self._number = self._stillborn = 0
        self._wanted = max(1, min(workers or room, most))
        for _ in range(self._wanted):
            self._spawn()

    def free(self) -> Sequence[tuple[int, str | None]]:
        busy = {worker for worker, _ in self._running.values()}
        return [(worker, held) for worker, held in self._held.items() if worker not in busy]

    def start(self, worker: int, job: Job, case: Case, *given: Any) -> None:
        self._held[worker] = case.weights
        self._running[self._actors[worker].take.remote(job, case, *given)] = (worker, job)

    def next(self) -> Ended | None:
        refs = [*self._running, *self._starting]
        if not refs:
            return None
        done, _ = self._ray.wait(refs, num_returns=1, timeout=None if self._running else STARTING)
        if not done:
            raise SweepError(
                f"no worker started in {STARTING:.0f} s: the cluster has {self._ray.available_resources().get('CPU', 0):g} free "
                "processors. Wait until it is free, or ask for smaller workers with --cpus"
            )
        ref = done[0]
        if ref in self._starting:
            self._started(ref)
            return None
        worker, job = self._running.pop(ref)
        try:
            return Ended(job, self._ray.get(ref))
        except self._ray.exceptions.RayError:  # whatever the job itself does wrong is an outcome: this is the worker's end
            self._bury(worker)
            self._spawn()
            return Ended(job, None)

    def close(self) -> None:
        for worker in list(getattr(self, "_actors", {})):
            self._bury(worker)
        if self._mine:
            self._ray.shutdown()

    def _spawn(self) -> None:
        actor = self._make.remote(*self._given)
        self._number += 1
        self._actors[self._number] = actor
        self._starting[actor.ready.remote()] = self._number

    def _started(self, ref: Any) -> None:
        worker = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._bury(worker)
            self._stillborn += 1
            if self._stillborn > self._wanted + 1 and not self._held:
                raise SweepError(
                    f"{self._stillborn} workers died as they started ({_first_line(error)}): every node needs this Python, this "
                    "version of Patchclamp and enough memory"
                ) from error
            self._spawn()
            return
        self._held[worker] = None

    def _bury(self, worker: int) -> None:
        self._held.pop(worker, None)
        self._ray.kill(self._actors.pop(worker))


def room_for(have: Mapping[str, float], cpus: int, gpus: float) -> int:
    """How many workers fit into what a cluster has in all."""
    return int(min(have.get("CPU", 0) / cpus, have.get("GPU", 0) / gpus if gpus else float("inf")))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise SweepError(
            "a sweep on Ray was asked for, and Ray is not installed: pip install 'patchclamp[ray]', or sweep here (--on here)"
        ) from error
    return ray


def _connect(ray: Any, address: str | None, workers: int | None, cpus: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": STORE}
        options |= {"num_cpus": workers * cpus} if workers else {}
    try:
        ray.init(**{"address": address, **options})
    except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
        asked = f"the cluster at {address!r} was asked for, and" if address else "a cluster was to be started here, and"
        raise SweepError(f"{asked} {_first_line(error)}: start one with `ray start --head`, or leave --address out") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.:')}" if lines else type(error).__name__
