"""What every test stands on: no network, shapes checked at run time, one thread per process, and the folder of shared models."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

import checking

ROOT = Path(__file__).resolve().parent.parent

if "patchclamp" in sys.modules:
    raise RuntimeError("patchclamp was imported before tests/conftest.py, so its shapes would go unchecked")
# Before transformers is imported; the subprocesses of tests inherit it.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)  # pytest-xdist runs one process per core
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")
jaxtyping.jaxtyped = checking.jaxtyped  # which the hook puts on every function
jaxtyping.install_import_hook("patchclamp", "beartype.beartype")


@pytest.fixture(scope="session")
def shared() -> Path:
    """What is too large to ship: the folder PATCHCLAMP_SHARED, seen from the repository's root; ../shared by default."""
    folder = ROOT / os.environ.get("PATCHCLAMP_SHARED", "../shared")
    if not folder.is_dir():
        pytest.skip("the folder of shared models, PATCHCLAMP_SHARED (default ../shared), is missing")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _shared_models_are_left_as_found() -> Iterator[None]:
    """After the last test of this process."""
    yield
    import cases

    if found := list(cases.changed()):
        pytest.fail(f"tests changed models that they share: {', '.join(found[:10])}", pytrace=False)


@pytest.fixture(autouse=True)
def _threads_are_left_as_found() -> Iterator[None]:
    """More threads round otherwise, and the next test may ask for equal bits."""
    yield
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1, f"the test left {threads} threads"


@pytest.fixture(scope="session")
def few_gates() -> Callable[[], AbstractContextManager[None]]:
    """While open, learned gates of the default budget are fitted with 3 seeds on batches of 12 instead of 4 on 32.

    With that budget wired roles are found in every seed (test_gating_roles.py), at a fifth of the multiplications.
    """
    from patchclamp.gating.objective import PRESETS, gating_settings

    @contextmanager
    def opened() -> Iterator[None]:
        small = gating_settings("default", seeds=3, batch=12, null_batch=12, null_seeds=1, refits=6)
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(PRESETS, "default", small)
            yield

    return opened


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in an empty folder, 200 columns wide; returns code, output and errors with line breaks as blanks."""
    from patchclamp.cli import common, main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # for consoles made later, as for an error
    for console in (common.out, common.err):
        monkeypatch.setattr(console, "_width", 200)  # rich takes COLUMNS when it is imported

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["patchclamp", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        seen = capsys.readouterr()
        return code, " ".join(seen.out.split()), " ".join(seen.err.split())

    return run
