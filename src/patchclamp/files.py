"""Files that are there whole or not at all, and whose damage is noticed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from patchclamp.errors import StoreError

TEMPORARY = ".part"


def write_atomically(path: Path, body: bytes | Callable[[Path], object]) -> str:
    """Write under a temporary name, flush to the disk, rename; returns the SHA-256 of what was written.

    Raises:
        StoreError: it cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        if callable(body):
            body(temporary)
        else:
            temporary.write_bytes(body)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        found = sha256(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror or error}): make room, or give another --out") from None
    finally:
        if temporary.exists():
            temporary.unlink()
    return found


def _flush(folder: Path) -> None:
    """A rename lasts once the folder itself is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache() -> Path:
    """What costs time to make again: PATCHCLAMP_CACHE; by default `patchclamp` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PATCHCLAMP_CACHE") or Path(base) / "patchclamp")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, wanted: str) -> None:
    """Raise `StoreError` where `path` is not there or its hash is not `wanted`."""
    if not path.is_file():
        raise StoreError(f"{path} is missing: run the same command again, and what is missing is computed anew")
    if (found := sha256(path)) != wanted:
        raise StoreError(
            f"{path} is damaged: its SHA-256 begins {found[:12]}, and {wanted[:12]} was written. Delete that file and run the "
            "same command again: only what is missing is computed anew"
        )
