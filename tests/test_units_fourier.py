"""Modular addition in the Fourier basis: planted logits come out exactly; against an explicit basis of p^2 inputs; against a model."""

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.units import MEASURES
from patchclamp.units.fourier import (
    component,
    excluded,
    fourier,
    gini,
    keys_of,
    logits_of,
    losses,
    neuron_logits,
    power,
    power_of_sums,
    restricted,
)  # fmt: skip


def planted(p: int, amplitudes: dict[int, float]) -> Tensor:
    """sum of amplitude cos(2 pi k (a + b - c) / p)."""
    a, b, c = torch.meshgrid(*[torch.arange(p, dtype=torch.double)] * 3, indexing="ij")
    return sum(size * torch.cos(2 * torch.pi * k * (a + b - c) / p) for k, size in amplitudes.items())  # type: ignore[return-value]


def basis(p: int, frequencies: list[int]) -> np.ndarray:
    """Functions cos and sin of k (a + b) on all inputs, made orthonormal: [p^2, 2 per frequency (1 for 0 and p / 2)]."""
    total = np.add.outer(np.arange(p), np.arange(p)).flatten()
    waves = [wave(2 * np.pi * k * total / p) for k in frequencies for wave in (np.cos, np.sin)]
    u, size, _ = np.linalg.svd(np.stack(waves, 1), full_matrices=False)
    return u[:, size > 1e-9]


@pytest.mark.parametrize("p", [13, 12])
def test_a_component_is_the_projection_on_an_explicit_basis(p: int) -> None:
    logits = torch.randn(p, p, p + 1, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    flat = logits.flatten(0, 1).numpy()
    for chosen in ([0], [1], [2, 5], [0, p // 2], list(range(p // 2 + 1))):
        q = basis(p, chosen)
        np.testing.assert_allclose(component(logits, chosen).flatten(0, 1), q @ (q.T @ flat), atol=1e-12)
    for k, found in enumerate(power_of_sums(logits), 1):
        assert float(found) == pytest.approx(float((basis(p, [k]).T @ flat).__pow__(2).sum()))
    whole = restricted(logits, [2, 3]) + excluded(logits, [2, 3]) - component(logits, [0])
    assert float((whole - logits).abs().max()) < 1e-12  # restricted and the rest are the logits


def test_planted_frequencies_are_recovered_exactly() -> None:
    p, amplitudes = 29, {3: 4.0, 7: 5.0, 12: 6.0}
    logits = planted(p, amplitudes)
    assert keys_of(power_of_sums(logits)) == (3, 7, 12)
    # |cos over all a, b, c|^2 = p^3 / 2
    expected = [amplitudes.get(k, 0.0) ** 2 * p**3 / 2 for k in range(1, p // 2 + 1)]
    np.testing.assert_allclose(power_of_sums(logits), expected, atol=1e-8)
    noise = torch.randn(p, p, p, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    memory = noise - component(noise, [0, 3, 7, 12])  # what has nothing of the algorithm in it
    both = logits + memory
    torch.testing.assert_close(restricted(both, (3, 7, 12)), logits, atol=1e-11, rtol=0)
    torch.testing.assert_close(excluded(both, (3, 7, 12)), memory, atol=1e-11, rtol=0)
    # the algorithm alone: the right answer's logit is the sum of amplitudes, and others follow the cosines
    step = torch.arange(p, dtype=torch.double)
    others = sum(size * torch.cos(2 * torch.pi * k * step / p) for k, size in amplitudes.items())
    torch.testing.assert_close(losses(logits), (others.logsumexp(0) - 15.0).expand(p, p), atol=1e-11, rtol=0)
    torch.testing.assert_close(losses(excluded(logits, (3, 7, 12))), torch.full((p, p), float(np.log(p))).double())


def test_gini_and_power_in_closed_form() -> None:
    assert gini(torch.ones(7)) == pytest.approx(0)
    assert gini(torch.eye(7)[3]) == pytest.approx(6 / 7)
    assert gini(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.25)
    for p in (11, 12):
        values = torch.randn(p, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        assert float(power(values).sum()) == pytest.approx(float((values - values.mean(0)).square().sum()))
        wave = torch.cos(2 * torch.pi * 4 * torch.arange(p) / p)[:, None]
        found = power(wave)
        assert float(found[3]) == pytest.approx(p / 2) and float(found.sum()) == pytest.approx(p / 2)
    assert keys_of(torch.ones(10)) == ()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "normless", "mixtral"])
def test_the_measure_is_the_models_own_logits_projected(name: str) -> None:
    p = 11
    model = cases.model_of(name)
    a, b = (side.flatten() for side in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    with torch.no_grad():
        rows = torch.stack([a, b, torch.full_like(a, p)], 1)
        flat = model.hf(input_ids=rows).logits[:, -1, :p].double().numpy()
    torch.testing.assert_close(logits_of(model, p).flatten(0, 1), torch.from_numpy(flat), atol=1e-5, rtol=0)
    train = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))[:40]
    table = fourier(model, rows[train], keys=[2, 4])
    by = {(part, kind): value for part, kind, value, *_ in table.rows()}
    q, q0, right = basis(p, [2, 4]), basis(p, [0]), (a + b).numpy() % p
    kept = q @ (q.T @ flat)
    test = np.setdiff1d(np.arange(p * p), train.numpy())
    for kind, values in (("loss", flat), ("restricted", kept + q0 @ (q0.T @ flat)), ("excluded", flat - kept)):
        nll = np.log(np.exp(values).sum(1)) - values[np.arange(p * p), right]
        for which, rows_of in (("", slice(None)), ("train.", train.numpy()), ("test.", test)):
            assert by["model", which + kind] == pytest.approx(nll[rows_of].mean(), abs=1e-4), (which, kind)
    assert by["model", "explained"] == pytest.approx((kept**2).sum() / ((flat - flat.mean(0)) ** 2).sum(), abs=1e-4)
    assert by["model", "accuracy"] == pytest.approx((flat.argmax(1) == right).mean())
    assert ("neurons", "gini") in by or name == "mixtral"
    assert sum(value for (part, kind), value in by.items() if part == "embed" and kind != "gini") == pytest.approx(1)


def test_the_neuron_logit_map_is_the_product_of_weights() -> None:
    gpt2, llama = cases.model_of("gpt2"), cases.model_of("llama")
    with torch.no_grad():
        out = gpt2.hf.transformer.h[1].mlp.c_proj.weight  # [neuron, width]; LayerNorm takes the mean away
        write = (out - out.mean(1, keepdim=True)) * gpt2.hf.transformer.ln_f.weight
        torch.testing.assert_close(neuron_logits(gpt2, 7).float(), (write @ gpt2.hf.lm_head.weight[:7].T).T, atol=1e-5, rtol=1e-4)
        write = llama.hf.model.layers[1].mlp.down_proj.weight.T * llama.hf.model.norm.weight
        torch.testing.assert_close(
            neuron_logits(llama, 7).float(), (write @ llama.hf.lm_head.weight[:7].T).T, atol=1e-5, rtol=1e-4
        )


def test_key_frequencies_by_the_embedding_or_the_neurons() -> None:
    p, number = 11, torch.arange(11)
    hf = cases.tiny("llama")
    waves = [wave(2 * torch.pi * k * number / p) for k in (2, 5) for wave in (torch.cos, torch.sin)]
    with torch.no_grad():
        hf.model.embed_tokens.weight[:p] = 0.01 * hf.model.embed_tokens.weight[:p]
        hf.model.embed_tokens.weight[:p, :4] += torch.stack(waves, 1)
        hf.lm_head.weight[:p] = torch.outer(torch.cos(2 * torch.pi * 3 * number / p), torch.ones(32))
    model = Model.load(hf)
    rows = torch.tensor([[1, 2, p], [3, 4, p]])
    for by, count in (("embed", 2), ("neurons", 1)):
        found = {(part, kind): value for part, kind, value, *_ in fourier(model, rows, by=by).rows()}  # type: ignore[arg-type]
        assert found["model", "keys"] == count
        keys = [k for k in range(1, 6) if found[by, f"frequency.{k}"] > 2 / 5]
        assert keys == ([2, 5] if by == "embed" else [3])
    with pytest.raises(MeasureError, match="experts"):
        fourier(cases.model_of("mixtral"), rows, by="neurons")


def test_without_rows_the_modulus_is_the_vocabularys_last_token() -> None:
    p = 13
    model = Model.load(cases.tiny("gpt2"))
    model.hf.resize_token_embeddings(p + 1)
    table = MEASURES["fourier"](model, None)
    assert len(table.filter(part="logits")) == p // 2 + 1 and table["n"].unique().to_list() == [p * p]


def test_rows_of_another_form_are_refused() -> None:
    model = cases.model_of("gpt2")
    for rows in (torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 2, 7], [1, 2, 8]]), torch.tensor([[9, 2, 7]])):
        with pytest.raises(MeasureError, match="give such"):
            fourier(model, rows)
    with pytest.raises(MeasureError, match="hardly adds"):
        fourier(Model.load("zoo/small"))
    with pytest.raises(MeasureError, match="frequencies 0 to 5"):
        fourier(model, torch.tensor([[1, 2, 11]]), keys=[6])
