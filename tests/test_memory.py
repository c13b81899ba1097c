"""Memory budgets: amounts as people write them, what is free, limits of control groups of both versions."""

import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchclamp.errors import BudgetError
from patchclamp.models.memory import SHARE, budget, free, group_limits, parse, shown, total


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("2GB", 2 * 10**9), ("2 gb", 2 * 10**9), ("512 MiB", 512 * 2**20), ("512mib", 512 * 2**20), ("1.5G", 15 * 10**8), ("7", 7),
     ("7b", 7), ("3k", 3000), ("3KiB", 3072), (".5 TB", 5 * 10**11), ("1TiB", 2**40), ("50%", 500), (" 12.5 % ", 125), ("100%", 1000)],
)  # fmt: skip
def test_amounts(text: str, bytes_: int):
    assert parse(text, of=1000) == bytes_


@pytest.mark.parametrize("text", ["", "GB", "2 GBs", "two", "-1GB", "1e9", "101%", "%", "2G B", "1,5GB", "inf", "nan"])
def test_what_is_no_amount(text: str):
    with pytest.raises(BudgetError, match="is no amount of memory: give one like 2GB"):
        parse(text, of=1000)


@given(st.integers(0, 10**16))
def test_shown_amounts_parse_back(amount: int):
    """To the one decimal that is shown: half a tenth of at least 1, thus 5 %; of three digits, half of 100."""
    assert parse(shown(amount), of=0) == pytest.approx(amount, rel=0.05)
    assert len(shown(amount).split()[0]) <= 5 or amount >= 10**15


def test_the_budget_is_a_share_of_what_is_free():
    there, within = total("cpu"), free("cpu")
    assert 0 < within <= there <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = budget("cpu")
    assert found.bit_count() == 1  # a power of two
    # what is free moves between two looks: by less than half of it
    assert SHARE * within / 4 < found < 2 * SHARE * within
    assert budget(torch.device("cpu"), "3MiB") == budget("cpu", 3 << 20) == 3 << 20
    assert budget("cpu", "10%") == pytest.approx(0.1 * within, rel=0.5)


def test_what_is_free_shrinks_as_it_is_taken():
    """2 GiB of pages that are touched are no longer free. Others free and take memory meanwhile: within half of that."""
    if free("cpu") < 4 << 30 or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("needs 4 GiB of free memory")
    before = free("cpu")
    taken = torch.ones(2 << 30, dtype=torch.uint8)
    assert before - free("cpu") == pytest.approx(len(taken), rel=0.5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [(0, "above 0"), ("0", "above 0"), (-5, "above 0"), (1 << 60, "ask for less"), ("900TB", "are free: ask for less"), ("many", "like 2GB")],
)  # fmt: skip
def test_budgets_that_cannot_be(asked: int | str, said: str):
    with pytest.raises(BudgetError, match=said):
        budget("cpu", asked)


def test_devices_that_are_not_there():
    with pytest.raises(BudgetError, match="there is no device 'tpu'"):
        budget("tpu")
    missing = f"cuda:{torch.cuda.device_count() if torch.cuda.is_available() else 0}"
    with pytest.raises(BudgetError, match=f"there is no device '{missing}' here"):
        budget(missing)


def group(folder: Path, limit: str, used: int, idle: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}[version]
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {idle}\nslab 3\n")


def test_limits_of_control_groups(tmp_path: Path):
    """Version 2: of the group and of all above it; a group without a limit says nothing; files not in use are not used."""
    group(tmp_path / "pod" / "job", "max", 100, 0, 2)
    group(tmp_path / "pod", "1000", 700, 300, 2)
    (tmp_path / "mine").write_text("12:pids:/elsewhere\n0::/pod/job\n")
    assert list(group_limits(tmp_path / "mine", tmp_path)) == [(1000, 400)]
    group(tmp_path / "pod" / "job", "500", 450, 20, 2)
    assert list(group_limits(tmp_path / "mine", tmp_path)) == [(500, 430), (1000, 400)]


def test_limits_of_control_groups_of_version_1(tmp_path: Path):
    """Its own folder; and in a container the path of the host, which is not there, and the limit at the mount."""
    group(tmp_path / "memory" / "job", "800", 100, 50, 1)
    (tmp_path / "mine").write_text("4:cpu,memory:/job\n0::/\n")
    assert list(group_limits(tmp_path / "mine", tmp_path)) == [(800, 50)]
    group(tmp_path / "memory", "600", 200, 0, 1)
    (tmp_path / "mine").write_text("4:memory:/docker/abc\n")
    assert list(group_limits(tmp_path / "mine", tmp_path)) == [(600, 200)]
    assert list(group_limits(tmp_path / "nowhere", tmp_path)) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device():
    """What PyTorch holds in reserve counts as free, what is in use does not."""
    before = free("cuda")
    taken = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    used = free("cuda")
    assert before - used >= len(taken) * 0.99
    del taken
    assert free("cuda") - used >= (1 << 30) * 0.99  # in reserve
    assert budget("cuda") <= SHARE * total("cuda")
