"""A hand-wired model as a folder, with its pairs beside it, for tests of the command line."""

import json
from pathlib import Path
from typing import Any

from patchclamp.tasks import Example
from patchclamp.zoo._wired import Wired


def body_of(example: Example) -> dict[str, Any]:
    """A pair as a line of JSONL has it."""
    pair = example.pair
    return {"clean": pair.clean, "corrupt": pair.corrupt, "answer": pair.answer[0], "wrong": (pair.wrong or (None,))[0]}


def save(truth: Wired, folder: Path, rows: int = 0, hf: Any = None) -> Path:
    """The folder of a wired model (or of `hf`, with its tokenizer); with `rows`, so many pairs as pairs.jsonl."""
    (truth.hf if hf is None else hf).save_pretrained(folder)
    truth.tokenizer.save_pretrained(folder)
    if rows:
        lines = [json.dumps(body_of(one)) for one in truth.task.examples(truth.tokenizer, rows, seed=2)]
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder
