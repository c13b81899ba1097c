"""Edges of the hand-wired GPT-2 and Llama models: exact effects through the model against plain numpy, edge by edge."""

import numpy as np
import pytest

from patchclamp.discover import rank_auroc
from patchclamp.methods import attribute
from patchclamp.models.model import Model
from patchclamp.parts import edges
from patchclamp.zoo import wired

NOTHING = 1e-2
"""Logits. Live edges carry at least half of one; the rest is what norms see of everything (1e-5 in Llama's float32) and e^-24."""
N = 3
QUICK = [("induction", "llama"), ("suppressor", "gpt2")]
LONG = [pytest.param(name, family, marks=pytest.mark.long) for name in ("induction", "and", "interfering", "facts", "or", "redundant",
        "suppressor", "backup") for family in ("gpt2", "llama") if (name, family) not in QUICK]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), [*QUICK, *LONG])
def test_exact_edges_are_the_live_ones(name: str, family: str) -> None:
    one = wired(name, family)
    parts = edges(Model.load(one.hf, tokenizer=one.tokenizer))
    scores = attribute(parts, one.task.examples(one.tokenizer, N), parts.fallback("resample"))
    values = np.abs(scores.values())
    live = one.live_edges(N)
    assert {str(site) for site, value in zip(scores.sites, values, strict=True) if value > NOTHING} == live
    assert rank_auroc(values, [str(site) in live for site in scores.sites]) == 1.0


def test_what_wired_edges_are() -> None:
    """In words: induction's predecessor goes to the keys of the head that copies; AND's two words meet in the last MLP."""
    assert wired("induction").live_edges(N) == {"embed>L0.kv1.v", "L0.h1>L1.kv2.k", "L1.h2>logits"}
    words = {"embed>L0.kv1.v", "embed>L0.kv2.v"}
    assert wired("and").live_edges(N) == words | {"L0.h1>L1.mlp", "L0.h2>L1.mlp", "L1.mlp>logits"}


def test_a_backup_has_edges_that_live_only_once_its_partner_is_closed() -> None:
    """Alone, closing what the speaker says loses it, and closing the mark it leaves lets the backup speak, too. What the backup
    reads and says matters only without the speaker."""
    one = wired("backup")
    assert one.live_edges(N) == {"L0.h1>L1.kv2.k", "L0.h1>logits"}
    assert one.used_edges(N) - one.live_edges(N) == {"L1.h2>logits", "embed>L0.kv1.v", "embed>L1.kv2.v"}
