"""Write a changed model as a checkpoint that transformers loads, whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patchclamp.errors import PatchclampError, StoreError
from patchclamp.models.load import no_bar
from patchclamp.models.model import Model
from patchclamp.tasks._batch import Batch

NOTE = "patchclamp.json"


def write_checkpoint(model: Model, folder: str | Path, about: Mapping[str, Any], prove: Batch) -> Path:
    """Weights (safetensors), configuration, tokenizer, and `patchclamp.json` with what was changed.

    The files are written beside the folder, loaded again and compared on `prove` bit for bit, and only then moved there.

    Raises:
        PatchclampError: the folder is there already.
        StoreError: what was written does not compute what the model does.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PatchclampError(f"{folder} is there already: choose another folder for the new checkpoint")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # on the same disk, and nobody else's
    fresh.chmod(0o755)
    try:
        with no_bar():
            model.hf.save_pretrained(fresh, safe_serialization=True)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(fresh)
        (fresh / NOTE).write_text(json.dumps(dict(about), indent=1, ensure_ascii=False), encoding="utf-8")
        again = Model.load(fresh, tokenizer=model.tokenizer, dtype=model.dtype, device=model.device)
        if not torch.equal(again.run(prove), model.run(prove)):
            raise StoreError(f"{folder}: the checkpoint as written gives other logits than the model; nothing was kept")
        if folder.exists():
            folder.rmdir()
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
