"""Outliers and instability: loops over what models return, moments of known distributions, eight bits written out on weights."""

import math

import numpy as np
import pytest
import torch

import cases
from patchclamp.edits import Zero
from patchclamp.errors import MeasureError
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.units.context import losses
from patchclamp.units.instability import foreseen, instability, rate_sensitivity
from patchclamp.units.outliers import _moments, int8, outliers

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]]


def numbers(table) -> dict[tuple[str, str], float]:  # type: ignore[no-untyped-def]
    return {(part, name): value for part, name, value, *_ in table.rows()}


def test_kurtosis_of_known_distributions() -> None:
    draw = torch.randn(1, 100, 3000, generator=torch.Generator().manual_seed(0))
    real = torch.ones(1, 100, dtype=torch.bool)
    assert float(_moments(draw, real)[1][0]) == pytest.approx(3, abs=0.05)  # 6 standard errors of 300000 draws are .05
    assert float(_moments(draw.sign(), real)[1][0]) == pytest.approx(1, abs=1e-3)
    spike = torch.zeros(1, 100, 10)
    spike[0, 3, 2] = 8.0  # one in n: kurtosis is n - 2 + 1 / (n - 1)
    largest, kurtosis = _moments(spike, real)
    assert float(kurtosis[0]) == pytest.approx(998 + 1 / 999) and float(largest[0]) == 8


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom"])
def test_numbers_of_padded_rows_are_those_of_rows_alone(name: str) -> None:
    model = cases.model_of(name)
    both = numbers(outliers(model, token_batch(ROWS))) | numbers(instability(model, token_batch(ROWS)))
    each = []
    for row in ROWS:
        kept = {str(site): value[0].detach().double().numpy() for site, value in
                model.record(torch.tensor([row]), ["L*.attn", "L*.mlp", "L*.resid.post", "L*.scores"]).items()}  # fmt: skip
        found: dict[tuple[str, str], float] = {}
        for part, value in kept.items():
            if part.endswith("scores"):
                for h, scores in enumerate(value):
                    found[part.replace("scores", f"h{h}"), "score"] = max(scores[t, : t + 1].max() for t in range(len(row)))
            else:
                found[part, "inf_norm"] = np.abs(value).max()
                found[part, "kurtosis"] = ((value - value.mean()) ** 4).mean() / value.var() ** 2
                found[part, "rms"] = np.sqrt((value**2).mean())
        with torch.no_grad():
            log_z = model.hf(input_ids=torch.tensor([row])).logits[0].double().logsumexp(-1).numpy()
        found["model", "log_z"], found["model", "log_z2"] = log_z.mean(), (log_z**2).mean()
        found["model", "score"] = max(value for (_, kind), value in found.items() if kind == "score")
        blocks = [f"L{layer}.resid.post" for layer in range(2)]
        found["model", "inf_norm"] = max(found[block, "inf_norm"] for block in blocks)
        found["model", "kurtosis"] = np.mean([found[block, "kurtosis"] for block in blocks])
        each.append(found)
    assert set(both) == set(each[0])
    for key, value in both.items():
        assert value == pytest.approx(np.mean([one[key] for one in each]), rel=1e-3, abs=1e-4), key


def rounded(weight: torch.Tensor, axis: int) -> torch.Tensor:
    scale = weight.abs().amax(axis, keepdim=True) / 127
    return torch.round(weight / scale) * scale


def test_eight_bits_are_the_pass_written_out() -> None:
    """A llama of one layer, attention taken away (its output's weights are 0): what is left is an MLP that can be written out."""
    hf = cases.tiny("llama")
    hf.config.num_hidden_layers = 1
    hf.model.layers = hf.model.layers[:1]
    layer = hf.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
    tokens = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(0))
    found = numbers(int8(Model.load(hf), tokens))
    with torch.no_grad():
        x = hf.model.embed_tokens(tokens)
        y = layer.post_attention_layernorm(x)
        gate_up = [getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj")]
        eight = torch.round(y / (y.abs().max() / 127)) * (y.abs().max() / 127)
        inner = torch.nn.functional.silu(y @ gate_up[0].T) * (y @ gate_up[1].T)  # what calibration sees
        made = torch.nn.functional.silu(eight @ rounded(gate_up[0], 1).T) * (eight @ rounded(gate_up[1], 1).T)
        scale = inner.abs().max() / 127
        made = (torch.round(made / scale)).clamp(-127, 127) * scale
        final = hf.model.norm(x + made @ rounded(layer.mlp.down_proj.weight, 1).T)
        logp = hf.lm_head(final).log_softmax(-1)
    expected = float(-logp[:, :-1].gather(-1, tokens[:, 1:, None]).mean())
    assert found["model", "loss.int8"] == pytest.approx(expected, abs=1e-5)
    assert found["model", "maps"] == 7 and found["model", "change.int8"] != 0


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom", "falcon", "opt"])
def test_eight_bits_cost_little_without_outliers_and_leave_the_model_alone(name: str) -> None:
    model = cases.model_of(name)
    tokens = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(0))
    before = losses(model, tokens)
    found = numbers(int8(model, tokens))
    assert found["model", "loss"] == pytest.approx(np.nanmean(before))
    assert 0 < abs(found["model", "change.int8"]) < 0.1
    np.testing.assert_array_equal(losses(model, tokens), before)


def test_numbers_with_edits_are_those_of_the_model_that_is_edited() -> None:
    """A head at zero by an edit, and by weights that are zero."""
    model, hf = cases.model_of("gpt2"), cases.tiny("gpt2")
    tokens = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(0))
    width = model.anatomy.sizes[0].head_width
    with torch.no_grad():
        hf.transformer.h[0].attn.c_proj.weight[width : 2 * width] = 0
    other, edits = Model.load(hf), {Site("z", 0, 1): Zero()}
    assert numbers(outliers(model, tokens, edits=edits)) == pytest.approx(numbers(outliers(other, tokens)), abs=1e-4)
    assert numbers(outliers(model, tokens)) != pytest.approx(numbers(outliers(other, tokens)), abs=1e-4)
    found, plain = (numbers(int8(model, tokens, edits=some)) for some in (edits, None))
    assert found["model", "loss"] == pytest.approx(numbers(int8(other, tokens))["model", "loss"], abs=1e-5)
    assert 0 < abs(found["model", "change.int8"]) < 0.1 and abs(found["model", "loss.int8"] - plain["model", "loss.int8"]) > 1e-4


def test_an_outlier_makes_eight_bits_worse() -> None:
    model, hf = cases.model_of("llama"), cases.tiny("llama")
    tokens = torch.randint(3, 97, (16, 9), generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad()
    ):  # one coordinate 300 times larger behind each norm, and the weights that read it as much smaller: the same model
        for layer in hf.model.layers:
            for norm, maps in (
                (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight[3] *= 300
                for one in maps:
                    getattr(layer.self_attn if "attn" in one or (one[1] == "_" and one[0] in "qkv") else layer.mlp, one).weight[
                        :, 3
                    ] /= 300
    spoilt = Model.load(hf)
    np.testing.assert_allclose(losses(spoilt, tokens), losses(model, tokens), atol=1e-4)
    plain, worse = (np.abs(losses_changed(which, tokens)) for which in (model, spoilt))
    assert worse > 5 * plain


def losses_changed(model: Model, tokens: torch.Tensor) -> float:
    return numbers(int8(model, tokens))["model", "change.int8"]


def test_experts_are_refused() -> None:
    with pytest.raises(MeasureError, match="experts"):
        int8(cases.model_of("mixtral"), torch.ones(1, 4, dtype=torch.long))


def test_sensitivity_is_its_formula() -> None:
    assert rate_sensitivity({1e-3: 2.0, 1e-2: 1.0, 1e-1: math.nan}, 4.0) == pytest.approx((2 + 1 + 4) / 3 - 1)
    assert rate_sensitivity({1e-3: 2.0, 1e-2: 2.0, 1e-1: 2.0}, 4.0) == 0
    assert rate_sensitivity({1e-3: 2.0, 1e-2: 1.0, 1e-1: math.inf}, 4.0) == rate_sensitivity(
        {1e-3: 2.0, 1e-2: 1.0, 1e-1: 9.0}, 4.0
    )
    for table, match in (
        ({1e-3: 1.0}, "at least 3"),
        ({1e-3: 1.0, 1e-2: 1.0, 1.0: 1.0}, "evenly"),
        (dict.fromkeys((1.0, 2.0, 4.0), 5.0), "lower"),
    ):
        with pytest.raises(MeasureError, match=match):
            rate_sensitivity(table, 4.0)


def test_a_power_law_goes_on() -> None:
    assert foreseen({10.0: 3 * 10**0.5, 100.0: 30.0, 1000.0: 3 * 1000**0.5}, 1e4) == pytest.approx(300)
    with pytest.raises(MeasureError, match="at least 3"):
        foreseen({1.0: 1.0}, 2.0)
