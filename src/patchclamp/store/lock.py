"""One writer per run: a lock that the system takes back when its process dies, however it dies."""

import os
from pathlib import Path

from patchclamp.errors import StoreError

NAME = ".lock"


class Lock:
    """A locked file that holds the writer's process id; a dead process's lock is free by itself."""

    def __init__(self, folder: Path) -> None:
        import fcntl

        self.path = folder / NAME
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(self._handle, 32).decode() or "unknown"
                os.close(self._handle)
                raise StoreError(
                    f"{folder} is being written by process {owner}: wait for it, stop it, or give another folder with --out"
                ) from None
            # Its last owner may have removed the file between our opening and locking it: then the lock is on nothing.
            if self.path.exists() and os.fstat(self._handle).st_ino == self.path.stat().st_ino:
                break
            os.close(self._handle)
        os.ftruncate(self._handle, 0)
        os.write(self._handle, str(os.getpid()).encode())

    def release(self) -> None:
        """Remove the file and let go."""
        self.path.unlink(missing_ok=True)
        os.close(self._handle)


def is_locked(folder: Path) -> bool:
    """Whether a living process is writing the run."""
    import fcntl

    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
