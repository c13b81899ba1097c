"""What every test stands on: no network, shapes checked at run time, one thread per process, and the folder of shared models."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent

if "patchclamp" in sys.modules:
    raise RuntimeError("patchclamp was imported before tests/conftest.py, so its shapes would go unchecked")
# Before transformers is imported; the subprocesses of tests inherit it.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)  # pytest-xdist runs one process per core
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")
install_import_hook("patchclamp", "beartype.beartype")


@pytest.fixture(scope="session")
def shared() -> Path:
    """What is too large to ship: the folder PATCHCLAMP_SHARED, seen from the repository's root; ../shared by default."""
    folder = ROOT / os.environ.get("PATCHCLAMP_SHARED", "../shared")
    if not folder.is_dir():
        pytest.skip("the folder of shared models, PATCHCLAMP_SHARED (default ../shared), is missing")
    return folder
