"""Memory: how much of a device is free, and how much of it a folded pass may take."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from patchclamp.errors import BudgetError

SHARE = 0.25
"""Of what is free, what a folded pass may take by default: the estimate of a pass is rough, and others use the machine too."""

UNITS = {
    **{"": 1, "b": 1},
    **{f"{letter}{tail}": 1000**power for power, letter in enumerate("kmgt", 1) for tail in ("", "b")},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}


def free(device: torch.device | str) -> int:
    """Bytes that this process can still take on a device.

    CUDA: what the driver says is free, and what PyTorch has reserved there and does not use. Else (CPU, and devices that share
    its memory): what the system can give without swapping, within the limits of the process's control groups.

    Raises:
        BudgetError: there is no such device.
    """
    device = _device(device)
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    import psutil

    return min([int(psutil.virtual_memory().available), *(max(0, limit - used) for limit, used in group_limits())])


def total(device: torch.device | str) -> int:
    """Bytes that a device has, or that the process's control groups leave of it.

    Raises:
        BudgetError: there is no such device.
    """
    device = _device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in group_limits())])


def budget(device: torch.device | str, asked: int | str | None = None) -> int:
    """Bytes that the activations of one folded pass may take on a device.

    Args:
        device: where the model is.
        asked: bytes; or as in `parse`. None: the largest power of two within a quarter of what is free. (A power of two, so that
            the same machine folds alike from run to run: another fold rounds otherwise, in the last digits.)

    Raises:
        BudgetError: what was asked is no amount, or more than the device has.
    """
    if asked is None:
        return 1 << max(0, int(SHARE * free(device)).bit_length() - 1)
    wanted = parse(asked, free(device)) if isinstance(asked, str) else asked
    if wanted < 1:
        raise BudgetError(f"{asked!r} of memory was asked for: choose an amount above 0, such as 2GB, or leave it out")
    if wanted > (there := total(device)):
        raise BudgetError(
            f"{asked!r} of memory was asked for, and {device} has {shown(there)}, of which {shown(free(device))} are free: ask for less"
        )
    return wanted


def parse(text: str, of: int) -> int:
    """Bytes of an amount as people write it: "2GB", "512 MiB", "1.5g", "800000", or "50%" of `of`.

    k, M, G and T are powers of 1000, with or without B; KiB, MiB, GiB and TiB powers of 1024. Case does not matter.

    Raises:
        BudgetError: it is no amount, or a share above 100 %.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*|%)\s*", text.lower())
    number, unit = found.groups() if found else ("", "?")
    if unit == "%" and float(number) <= 100:
        return int(float(number) / 100 * of)
    if unit not in UNITS:
        raise BudgetError(f"{text!r} is no amount of memory: give one like 2GB, 512MiB, or 50% of what is free")
    return int(float(number) * UNITS[unit])


def shown(amount: int | float) -> str:
    """Bytes for people: "1.2 GB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(amount, 0 if unit == "B" else 1) < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def group_limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[int, int]]:
    """(limit, used) of this process's control group and all above it, as far as they limit memory; none outside Linux.

    Used is without what the system gives back at once: files that were read and are not in use.

    Args:
        groups: which groups the process is in.
        root: where the hierarchies are mounted, version 2 at the root, version 1 in its folder `memory`.
    """
    if not groups.is_file():
        return
    for line in groups.read_text().splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            yield from _limits(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in names.split(","):
            yield from _limits(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _limits(mount: Path, path: str, limit: str, used: str, idle: str) -> Iterator[tuple[int, int]]:
    """Of every group from `path` up. In a container the path may be that of the host, and the mount the group itself."""
    group = mount / path.lstrip("/")
    for place in (group, *group.parents):
        if (place / limit).is_file() and (place / used).is_file():
            most = (place / limit).read_text().strip()
            if most.isdigit():  # "max": no limit
                yield int(most), max(0, int((place / used).read_text()) - _statistic(place / "memory.stat", idle))
        if place == mount:
            return


def _statistic(file: Path, name: str) -> int:
    lines = (line.split() for line in file.read_text().splitlines()) if file.is_file() else ()
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BudgetError(f"there is no device {device!r}: {str(error).splitlines()[0]}") from None
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise BudgetError(f"there is no device {str(found)!r} here: there are {count} CUDA devices. Choose cpu, or one of them")
    return found
