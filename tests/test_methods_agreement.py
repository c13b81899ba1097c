"""Agreement of methods with exact effects, and what randomised weights do to their scores."""

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp import methods
from patchclamp.errors import NumericsError, PatchclampError
from patchclamp.methods import compare, effects, sanity
from patchclamp.methods._agreement import against
from patchclamp.methods._sanity import randomised
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, nodes
from test_parts import examples


@pytest.fixture(scope="module")
def gpt2() -> Nodes:
    return nodes(Model.load(tiny("gpt2")))


def test_agreement_by_hand():
    exact = np.array([3.0, -2.0, 1.0, 0.0])
    same = against(2 * exact, exact, top=2)
    assert same == {
        "pearson": pytest.approx(1),
        "spearman": pytest.approx(1),
        "relative_l2": pytest.approx(1),
        "overlap": 1.0,
        "wrong_signs": 0,
    }
    other = against(np.array([3.0, 2.0, 5.0, 0.0]), exact, top=2)
    # ranks 3 2 4 1 against 4 1 3 2: 1 - 6 (1 + 1 + 1 + 1) / (4 x 15)
    assert other["spearman"] == pytest.approx(0.6) and other["overlap"] == 0.5 and other["wrong_signs"] == 1
    assert other["relative_l2"] == pytest.approx(np.sqrt(32 / 14))
    assert other["pearson"] == pytest.approx(np.corrcoef([3, 2, 5, 0], exact)[0, 1])
    assert against(np.zeros(4), exact, top=1)["pearson"] is None


def test_methods_stand_beside_the_exact_effects(gpt2: Nodes):
    some, fallback = examples(2), gpt2.fallback("resample")
    table = compare(gpt2, some, fallback, ["alone", "exact", "gradient", "importance"])
    assert table["method"].to_list() == ["exact", "alone", "gradient", "importance"]
    rows = {row["method"]: row for row in table.iter_rows(named=True)}
    assert rows["alone"]["relative_l2"] < 0.02 and rows["alone"]["pearson"] > 0.999
    exact, gradient = (effects(gpt2, some, fallback, name).double().mean(1).numpy() for name in ("exact", "gradient"))
    assert rows["gradient"]["relative_l2"] == pytest.approx(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
    assert rows["gradient"]["forward"] == 2 and rows["exact"]["forward"] == 11
    assert rows["importance"]["pearson"] == pytest.approx(
        np.corrcoef(effects(gpt2, some, fallback, "importance").double().mean(1).numpy(), np.abs(exact))[0, 1]
    )
    refused = compare(gpt2, some, fallback, ["deeplift", "gradient"], metric="nll")
    assert refused["pearson"].is_null().to_list() == [False, True, False]
    assert "linear in the logits" in refused["refused"][1] and refused["refused"].null_count() == 2
    with pytest.raises(PatchclampError, match="top 11"):
        compare(gpt2, some, fallback, ["gradient"], top=11)


def test_nothing_to_agree_with_is_an_error(gpt2: Nodes):
    from dataclasses import replace

    some = examples(2)
    same = replace(some, items=tuple(replace(one, corrupt=one.clean) for one in some))
    with pytest.raises(NumericsError, match="every exact effect is zero"):
        compare(gpt2, same, gpt2.fallback("resample"), ["gradient"])


def test_weights_are_shuffled_from_the_top_and_the_model_stays(gpt2: Nodes):
    before = {name: weight.clone() for name, weight in gpt2.model.hf.named_parameters()}
    other = dict(randomised(gpt2.model, [1]).hf.named_parameters())
    changed = {name for name, weight in other.items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("transformer.h.1.") and before[name].dim() > 1 for name in changed)
    for name in changed:
        assert torch.equal(other[name].flatten().sort().values, before[name].flatten().sort().values)  # the scale survives
    assert all(torch.equal(weight, before[name]) for name, weight in gpt2.model.hf.named_parameters())


def test_sanity_tells_a_method_that_follows_the_model_from_one_that_knows_nothing(gpt2: Nodes):
    table = sanity(gpt2, examples(2), "resample", ("exact", "segments", "random"), top=3)
    by = {(row["method"], row["shuffled"]): row for row in table.iter_rows(named=True)}
    assert set(by) == {(name, count) for name in ("exact", "segments", "random") for count in (0, 1, 2)}
    for count in (0, 1, 2):
        assert by["exact", count]["agreement"] == pytest.approx(1)
        assert by["exact", count]["similarity"] == by["exact", count]["exact_similarity"]
        assert by["random", count]["similarity"] == pytest.approx(1)  # alike whatever the weights, and yet it knows nothing
        assert by["segments", count]["agreement"] > 0.9 > by["random", count]["agreement"]
    assert by["exact", 2]["similarity"] < 0.95


def test_what_stands_beside_the_methods_has_public_names_and_is_no_method():
    beside = ("compare", "largest_missed", "sanity")
    assert all(callable(getattr(methods, name)) and name in methods.__all__ for name in beside)
    assert not {*beside} & {*methods.method_names()}
    assert all(hasattr(methods, name) for name in methods.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(methods, "nonsense")  # noqa: B009  pyright would see through a plain attribute
