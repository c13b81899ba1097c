"""What Ray costs a sweep: seconds per plan with 1 and 2 workers against the same plans in one process.

Ways alternate, so that a machine that slows down slows all of them; each begins in an empty folder. The clock starts
when as many plans have ended as there are workers, so that starting a cluster and loading models are not in it. Prints the
median and spread of seconds per
plan, the ratio to one process, whether all numbers are equal bit for bit, and the peak of memory of the processes together.

    python benchmarks/sweep.py --model zoo/small --task ioi --plans 8 --rounds 3
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import polars as pl
import psutil
import torch

from patchclamp.store import load_record
from patchclamp.study import Plan
from patchclamp.sweep import Case, sweep

WAYS = (0, 1, 2)  # workers; 0: in this process


@contextmanager
def peak_memory() -> Generator[list[float]]:
    """The largest sum of resident memory (MB) of this process and all below it while open, looked at ten times a second."""
    found, stop = [0.0], threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not stop.wait(0.1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            found[0] = max(found[0], total / 1e6)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Measured:
    """One sweep: seconds per plan, the peak of memory in MB, and every plan's table."""

    seconds: float
    memory: float
    tables: tuple[pl.DataFrame, ...]


def measured(workers: int, cases: Sequence[Case], cpus: int) -> Measured:
    """One sweep in an empty folder. The clock starts when the first plans have ended, one per worker."""
    first, ends = max(1, workers), list[float]()
    options: dict[str, Any] = {"on": "ray", "workers": workers, "cpus": cpus} if workers else {}
    with tempfile.TemporaryDirectory() as out, peak_memory() as peak:
        swept = sweep(cases, out, progress=lambda row, done, of: ends.append(time.perf_counter()), **options)
        if swept.failed:
            raise SystemExit(f"a plan failed: {swept.failed[0].error}")
        tables = tuple(load_record(row.folder).scores for row in swept.rows if row.folder is not None)
    return Measured((ends[-1] - ends[first - 1]) / (len(cases) - first), peak[0], tables)


def main() -> None:
    """Print a line per way."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="zoo/small")
    ask.add_argument("--task", default="ioi")
    ask.add_argument("--plans", type=int, default=8)
    ask.add_argument("--n", type=int, default=64)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--cpus", type=int, default=1, help="threads of a worker, and of the one process")
    ask.add_argument("--steps", nargs="+", default=["verify", "discover"])
    asked = ask.parse_args()
    cases = [Case(asked.model, asked.task, Plan(n=asked.n, seed=seed), tuple(asked.steps)) for seed in range(asked.plans)]
    torch.set_num_threads(asked.cpus)
    found: dict[int, list[Measured]] = {workers: [] for workers in WAYS}
    for _ in range(asked.rounds):
        for workers in WAYS:
            found[workers].append(measured(workers, cases, asked.cpus))
    alone = statistics.median(one.seconds for one in found[0])
    print(
        f"{asked.plans} plans of {asked.model} on {asked.task}, n {asked.n}, {asked.cpus} threads a worker, {os.cpu_count()} processors"
    )
    for workers, all_of in found.items():
        seconds = [one.seconds for one in all_of]
        same = all(a.equals(b) for one in all_of for a, b in zip(one.tables, found[0][0].tables, strict=True))
        print(
            f"{'one process' if not workers else f'Ray, {workers} workers':<15} {statistics.median(seconds):7.3f} s a plan "
            f"({min(seconds):.3f} to {max(seconds):.3f}), {statistics.median(seconds) / alone:5.2f} of one process, "
            f"{max(one.memory for one in all_of):6.0f} MB, numbers {'equal' if same else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    main()
