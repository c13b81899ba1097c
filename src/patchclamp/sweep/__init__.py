"""Sweep: many plans (models x tasks x seeds x methods x checkpoints), here or on Ray.

>>> from patchclamp.sweep import read_plans, sweep
>>> swept = sweep(read_plans("plans.toml"), out="runs")                # doctest: +SKIP
>>> swept.table.select("model", "task", "seed", "accuracy", "circuit")  # doctest: +SKIP

Each plan is a run in its folder, as `patchclamp map` writes it; a plan whose run is finished is not done again, one that was
interrupted goes on at its last finished step, and one that fails does not stop the others.
"""

from collections.abc import Sequence
from pathlib import Path

from patchclamp.errors import StoreError, SweepError
from patchclamp.sweep.case import Case
from patchclamp.sweep.drive import Drive, Pool, Progress
from patchclamp.sweep.place import Place, is_finished
from patchclamp.sweep.plans import read_plans
from patchclamp.sweep.rows import Row, Swept, read_table, write_table
from patchclamp.sweep.worker import Job, Worker

__all__ = ["Case", "Row", "Swept", "identified", "read_plans", "read_table", "sweep"]


def sweep(
    plans: str | Path | Sequence[Case],
    out: str | Path = "runs",
    *,
    on: str = "here",
    address: str | None = None,
    workers: int | None = None,
    cpus: int = 1,
    gpus: float | None = None,
    shards: int = 1,
    progress: Progress | None = None,
) -> Swept:
    """Carry out many plans.

    Args:
        plans: a plans.toml (`read_plans`), or cases.
        out: the folder of all runs: each goes into the first 12 characters of its digest, and a table of all of them into
            sweep.parquet (`read_table`), which is written again as each plan ends.
        on: "here", one after the other in this process; "ray", a plan per task on workers that keep the model they hold.
        address: of a Ray cluster ("auto", "host:6379"); None: one is started here, and stopped at the end.
        workers: on Ray; by default as many as the cluster has room for, and plans or pieces to do.
        cpus: processors, and torch's threads, of a worker.
        gpus: of a worker; by default 1 where the cluster has any.
        shards: into how many pieces, at most, a plan's examples are dealt to be scored by as many workers. Pieces are whole
            batches of 64, so sets of 64 prompts (n = 256) are not divided.
        progress: told (row, plans ended, plans in all) as each plan ends.

    Returns:
        a row per plan: done, kept from before, or failed with its error. A worker that dies is replaced and its job tried
        again, 3 times in all. Numbers are those of `patchclamp map`, bit for bit where threads and machine are the same.

    Raises:
        SweepError: nothing is asked, a cluster cannot be reached or starts no worker, the folder cannot be written, Ray is missing.
        PatchclampError: a task or a model's folder is not there: said before anything runs.
    """
    cases = _checked(plans)
    if shards < 1 or (workers is not None and workers < 1) or cpus <= 0:
        raise SweepError(f"{shards} shards, {workers} workers and {cpus} processors were asked for: choose 1 or more of each")
    place = Place(Path(out).expanduser().resolve())
    pool = _pool(place, on, address, workers or None, cpus, gpus, len(cases) * shards)
    try:
        place.open()
        drive = Drive(cases, place, pool, shards, lambda row, done, of: None)
        told = progress or (lambda row, done, of: None)

        def ended(row: Row, done: int, of: int) -> None:
            write_table(place.folder, drive.table())
            told(row, done, of)

        drive.told = ended
        return Swept(drive.run(), place.folder)
    finally:
        pool.close()
        place.close()


def identified(plans: str | Path | Sequence[Case], out: str | Path = "runs") -> tuple[Row, ...]:
    """What a sweep would do, without doing it: a row per plan with its digest, "kept" where its run is finished in `out`.

    Cost: every model is loaded once, since a digest is of the weights. A plan whose model or task cannot be loaded is "failed".
    """
    cases = _checked(plans)
    place = Place(Path(out).expanduser().resolve())
    worker = Worker(place)
    rows = {
        number: _identified(worker, number, cases[number])
        for number in sorted(range(len(cases)), key=lambda number: cases[number].weights)
    }
    return tuple(rows[number] for number in range(len(cases)))


def _identified(worker: Worker, number: int, case: Case) -> Row:
    outcome = worker.take(Job(number, "identify"), case, 1)
    if outcome.error:
        return Row(case, "failed", error=outcome.error)
    digest, _ = outcome.value
    folder = worker.place.run(digest)
    try:
        finished = is_finished(folder, digest, case.steps)
    except StoreError as error:
        return Row(case, "failed", digest, error=str(error))
    return Row(case, "kept", digest, folder) if finished else Row(case, "waiting", digest)


def _checked(plans: str | Path | Sequence[Case]) -> tuple[Case, ...]:
    cases = read_plans(plans) if isinstance(plans, str | Path) else tuple(plans)
    if not cases:
        raise SweepError("a sweep of no plans was asked for: give a plans.toml, or cases")
    for case in {(case.model, case.task, str(case.asked)): case for case in cases}.values():
        case.check()
    return cases


def _pool(place: Place, on: str, address: str | None, workers: int | None, cpus: int, gpus: float | None, most: int) -> Pool:
    if on == "ray":
        from patchclamp.sweep.on_ray import OnRay

        return OnRay(place, address, workers, cpus, gpus, most)
    if on != "here":
        raise SweepError(f"a sweep on {on!r} was asked for: choose here or ray")
    if address is not None or workers is not None:
        raise SweepError("an address and workers are Ray's: give on='ray' (--on ray) as well")
    from patchclamp.sweep.here import Here

    return Here(place)
