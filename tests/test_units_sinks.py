"""Sinks: heads of wired models whose attention is known in closed form; loops over what models return; drained values put there."""

import numpy as np
import pytest
import torch

import cases
from patchclamp.errors import MeasureError
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.units.sinks import alpha, dormancy, even, sinks
from patchclamp.zoo import wired


def numbers(table) -> dict[tuple[str, str], float]:  # type: ignore[no-untyped-def]
    return {(part, name): value for part, name, value, *_ in table.rows()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_wired_heads_that_rest_and_that_spread_evenly(family: str) -> None:
    """L0.h0 looks at <bos> alone and writes nothing; L0.h3 is the same; L1.h3 is dead, and spreads its attention evenly."""
    made = wired("induction", family)
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    rows = torch.tensor([[1, *range(3, 18)], [1, *range(8, 23)]])
    found = numbers(sinks(model, rows))
    harmonic = sum(1 / t for t in range(1, 17)) / 16
    assert found["model", "chance.alpha"] == pytest.approx(harmonic)
    dead = [part for part in found if part[1] == "written" and found[part] == 0 and found[part[0], "alpha"] < 0.5]
    resting = [part for part in found if part[1] == "alpha" and found[part] > 0.999]
    assert dead and resting
    for part, _ in dead:
        assert found[part, "alpha"] == pytest.approx(harmonic, abs=1e-6) and found[part, "sink"] == 0
    for part, _ in resting:
        assert found[part, "sink"] == 1
    heads = [value for (part, name), value in found.items() if name == "sink" and part != "model"]
    assert found["model", "sink"] == pytest.approx(np.mean(heads))


def test_even_attention_is_the_harmonic_number() -> None:
    assert even(64) == pytest.approx(0.0741, abs=1e-4)  # the control of the sink metric at T = 64
    pattern = torch.ones(1, 1, 6, 6).tril() / torch.arange(1, 7)[None, None, :, None]
    found = alpha(pattern, torch.ones(1, 6, dtype=torch.bool))[0, 0]
    np.testing.assert_allclose(found, [even(6, k) for k in range(1, 7)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gpt_oss", "gemma2"])
def test_every_number_is_a_loop_over_what_is_recorded(name: str) -> None:
    model = cases.model_of(name)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [12, 13, 14, 15, 16]]
    table = sinks(model, token_batch(rows), key=2)
    found = {row: numbers(sinks(model, torch.tensor([tokens]), key=2)) for row, tokens in enumerate(rows)}
    for (part, kind), value in numbers(table).items():  # padded rows: their mean is that of rows alone
        assert value == pytest.approx(np.mean([found[0][part, kind], found[1][part, kind]]), rel=1e-3, abs=1e-5), (part, kind)
    tokens = torch.tensor(rows[:1])
    kept = {
        str(site): value[0].detach().double()
        for site, value in model.record(tokens, ["L1.pattern", "L1.v", "L1.h*.write", "L*.resid.*"]).items()
    }
    group = kept["L1.pattern"].shape[0] // kept["L1.v"].shape[1]
    for h in range(kept["L1.pattern"].shape[0]):
        pattern, v = kept["L1.pattern"][h], kept["L1.v"][:, h // group].norm(dim=-1)
        own = float(np.mean([pattern[t, 1] for t in range(1, 8)]))
        assert found[0][f"L1.h{h}", "alpha"] == pytest.approx(own, abs=1e-6)
        assert found[0][f"L1.h{h}", "sink"] == float(own > 0.3)
        drained = [j for j in range(8) if v[j] < 0.5 * np.median(v)]
        assert found[0][f"L1.h{h}", "idle"] == pytest.approx(float(pattern[:, drained].sum(1).mean()), abs=1e-6)
        written = float((kept[f"L1.h{h}.write"].norm(dim=-1) / kept["L1.resid.pre"].norm(dim=-1)).mean())
        assert found[0][f"L1.h{h}", "written"] == pytest.approx(written, rel=1e-4)
        assert found[0][f"L1.kv{h // group}", "drain"] == pytest.approx(float(v[1] / v[[0, 2, 3, 4, 5, 6, 7]].mean()), rel=1e-4)
    size = kept["L1.resid.post"].norm(dim=-1)
    assert found[0]["L1.resid.post", "peak"] == pytest.approx(float(size[1] / size[[0, 2, 3, 4, 5, 6, 7]].mean()), rel=1e-4)


def test_cut_rows_are_shorter_rows() -> None:
    model = cases.model_of("llama")
    rows = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    cut, short = numbers(sinks(model, rows, length=7)), numbers(sinks(model, rows[:, :7]))
    assert cut == pytest.approx(short, rel=1e-4, abs=1e-6)
    with pytest.raises(MeasureError, match="longer rows"):
        sinks(model, rows, length=1)


def test_a_head_that_rests_on_one_kind_of_input_is_dormant_there() -> None:
    """Wired L0 heads look at <bos> where there is one; without it their attention is spread evenly. The working head switches too."""
    made = wired("induction")
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    words = torch.tensor([[*range(3, 13), *range(3, 13)], [*range(8, 18), *range(8, 18)]])
    begun = torch.cat([torch.ones(2, 1, dtype=torch.long), words], 1)
    found = numbers(dormancy(model, {"one": words, "other": begun}))
    mute = [part for (part, name), value in found.items() if name == "alpha.other" and value > 0.999]
    assert mute
    for part in mute:
        assert found[part, "alpha.one"] == pytest.approx(even(20), abs=1e-3)
        assert found[part, "switch"] == pytest.approx(1 - even(20), abs=1e-3)
        assert abs(found[part, "effect.one"]) < 1e-6 and abs(found[part, "effect.other"]) < 1e-6
    with pytest.raises(MeasureError, match="two kinds"):
        dormancy(model, {"one": words})
    for kind in ("one", "other"):
        assert found["L1.h2", f"effect.{kind}"] > 0.5  # the induction head says what followed, on both
