"""Runs on disk: a folder per run, from which a killed run resumes and the report is made.

::

    runs/0f3a9c21b7de/
      plan.json             the question
      manifest.json         finished steps and files with their SHA-256
      steps/                one result per step: JSON, Parquet, safetensors
      scores.parquet        the table of parts; toggles, curve and random.parquet beside it
      tensors.safetensors   attention patterns
      study.json            everything else that the report shows
      report.html

With `with Run.open(...) as run:` an exception takes away what this session wrote (nothing is left of a command that fails);
Ctrl-C, `kill` and `kill -9` leave finished steps, and opening the same run again goes on from them.
"""

from patchclamp.store.hashing import digest, weights_hash
from patchclamp.store.listing import RunInfo, load_plan, load_record, load_step, runs
from patchclamp.store.record import Record
from patchclamp.store.run import Run, Watch

__all__ = ["Record", "Run", "RunInfo", "Watch", "digest", "load_plan", "load_record", "load_step", "runs", "weights_hash"]
