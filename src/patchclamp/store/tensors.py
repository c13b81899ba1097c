"""Named tensors in one safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from patchclamp.errors import StoreError
from patchclamp.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", about: Mapping[str, str]) -> Path:
    """Write tensors and text about them; all or nothing. Raises `StoreError` where the file cannot be written."""
    from safetensors.torch import save

    body = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}  # views share memory
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(body, metadata=dict(about)))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
