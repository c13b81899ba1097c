"""Conformance of replay: gates on any site of any family, from the middle of the model, equal whole runs one by one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CONFIGS, model_of, tiny
from patchclamp.errors import SiteError
from patchclamp.methods import attribute
from patchclamp.metrics import METRICS
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.models.replay import why_plain
from patchclamp.models.standing import Start
from patchclamp.parts import Gated, gated, measuring, nodes
from patchclamp.parts.fallbacks import Own
from patchclamp.sites import KINDS, Site
from patchclamp.tasks._batch import Batch
from test_parts import examples, plainly

KIND = ["resid.pre", "resid.mid", "resid.post", "attn", "attn.write", "mlp.write", "head", "mlp", "z", "q", "k", "v", "scores",
        "pattern", "neuron"]  # fmt: skip


def parts_at(model: Model, kind: str, positions: tuple[int | str, ...]) -> Gated | None:
    """Parts of one kind in every layer, or None where the model has none."""
    patterns = {"head": "L*.h*", "mlp": "L*.mlp", "neuron": "L*.mlp.n*"}
    pattern = patterns.get(kind, f"L*.h*.{kind}" if kind in ("q", "z", "scores", "pattern") else f"L*.{kind}")
    pattern = f"L*.kv*.{kind}" if kind in ("k", "v") else pattern
    try:
        return gated(model, [pattern], positions)
    except SiteError:
        return None


@given(
    name=st.sampled_from(list(CONFIGS)), kind=st.sampled_from(KIND), data=st.data(), seed=st.integers(0, 99),
    fallback=st.sampled_from(["resample", "zero"]), positions=st.sampled_from([(), ("end",), (3, 4), ("fact", "end")]),
)  # fmt: skip
@settings(max_examples=250)
def test_every_site_of_every_family_from_the_middle(
    name: str, kind: str, data: st.DataObject, seed: int, fallback: str, positions: tuple[int | str, ...]
):
    """Tolerance: float32 sums in another order, 1e-5 of the largest logit; 1e-4 where the residual stream is put to zero, for
    norms divide its rounding errors by sqrt(eps)."""
    model = model_of(name)
    assert why_plain(model) == ""
    parts = parts_at(model, kind, positions)
    if parts is None:
        return
    batch = examples(3, lengths=data.draw(st.sampled_from([(7,), (7, 5)])), seed=seed).batch()
    draw = torch.Generator().manual_seed(seed)
    count = data.draw(st.integers(2, 5))
    gates = parts.open(count)
    for number in range(count):
        several = torch.randint(0, gates.shape[-1], (1 + number % 3,), generator=draw)
        gates[number, ..., several] = float(torch.randint(0, 2, (1,), generator=draw)) / 2
    rule = parts.fallback(fallback)
    with torch.no_grad():
        expected = plainly(parts, batch, gates, rule)
    scale = max(1.0, float(model.target_logits(batch).detach().abs().max()))
    parts.memory = data.draw(st.sampled_from([1, 1 << 30]))  # one at a time, or all at once
    allowed = scale * (1e-4 if (fallback, kind[:5]) == ("zero", "resid") else 1e-5)
    torch.testing.assert_close(parts.measure(batch, gates, rule), expected, atol=allowed, rtol=0)


def test_every_metric_from_the_middle():
    model = model_of("llama")
    parts, batch = nodes(model), examples(4, lengths=(7, 5)).batch()
    gates, fallback = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    reference = model.target_logits(batch).detach()[0]
    with torch.no_grad():
        logits = [model.target_logits(batch, parts.edits(one[None], fallback, batch)) for one in gates]
    for metric in METRICS.values():
        expected = torch.cat([metric(one, batch, reference) for one in logits])
        torch.testing.assert_close(parts.measure(batch, gates, fallback, metric), expected, atol=2e-5, rtol=1e-4)


def test_windows_of_layers_are_settings():
    """Several gates closed at once, across layers and positions: what causal tracing slides over the depth."""
    model = model_of("qwen3")
    parts, batch = gated(model, ["L*.mlp.write", "L*.attn.write"], positions=("fact", "end")), examples(3).batch()
    fallback = parts.fallback("resample")
    gates = parts.open(4)
    for number in range(4):
        gates[number, ..., number : number + 3] = 0
    with torch.no_grad():
        expected = plainly(parts, batch, gates, fallback)
    torch.testing.assert_close(parts.measure(batch, gates, fallback), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
def test_under_noise_each_column_is_that_of_the_blurred_run(name: str):
    """Heads and MLPs at single positions put back to the clean run's, while noise is added to the embeddings: from the middle
    as whole runs one by one, in the first block too."""
    model, batch = model_of(name), examples(3).batch()
    parts = gated(model, ["L*.h*", "L*.mlp", "L*.resid.post"], positions=(2, 4, 6))
    own = Own(parts.record, "fact")
    own.at(batch)
    noise = (
        torch.randn(*batch.tokens.shape, model.width, generator=torch.Generator().manual_seed(0))
        * batch.columns("fact")[..., None]
    )
    blurred, gates = parts.under(noise), 1 - torch.eye(len(parts.labels))[:, None, None]
    with torch.no_grad():
        rows = [
            METRICS["logit_diff"](model.target_logits(batch, {**blurred.base(), **parts.edits(one[None], own, batch)}), batch)[0]
            for one in gates
        ]
    torch.testing.assert_close(blurred.measure(batch, gates, own), torch.stack(rows), atol=2e-5, rtol=1e-4)


def test_what_can_have_no_gate():
    model = model_of("gpt2")
    with pytest.raises(SiteError, match="fits none"):
        gated(model, ["L7.h9.q"])
    assert all(not KINDS[site.kind].writable for site in model.sites if site.kind == "write")
    with pytest.raises(SiteError, match="written"):
        gated(model, ["L0.h0.write"])


def test_a_neuron_is_a_part():
    parts = gated(model_of("gpt2"), ["L1.mlp.n3", "L1.mlp.n5"])
    assert parts.labels == (Site("neuron", 1, 3), Site("neuron", 1, 5)) and parts.counted == (0, 1)


def test_rounding_is_measured_and_what_is_below_it_is_said():
    """Real effects are above it; closing what no difference has reached yet is below it."""
    model = model_of("gpt2")
    parts, some = nodes(model), examples(6)
    scores = attribute(parts, some, parts.fallback("resample"), "exact")
    floor = scores.about["noise_floor"]
    assert 0 <= floor < 1e-5 and not scores.table["below_noise"].all()
    still = gated(model, ["L0.resid.pre"], positions=(0,))  # before the first difference: closing it changes nothing
    found = attribute(still, some, still.fallback("resample"), "exact")
    assert found.table["below_noise"].to_list() == [True]


def test_running_out_of_memory_halves_what_runs_at_once(monkeypatch: pytest.MonkeyPatch):
    model = Model.load(tiny("gpt2"))
    parts, batch = nodes(model), examples(3).batch()
    gates, fallback = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    expected, own, sizes = parts.measure(batch, gates, fallback), Model.target_logits, list[int]()

    def small(self: Model, given: Batch, edits: Edits | None = None, settings: int = 1, start: Start = Start()) -> torch.Tensor:
        sizes.append(settings)
        if settings > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, given, edits, settings, start)

    monkeypatch.setattr(Model, "target_logits", small)
    with pytest.warns(UserWarning, match="memory ran out with"):
        torch.testing.assert_close(parts.measure(batch, gates, fallback), expected, atol=1e-6, rtol=0)
    assert max(sizes) > 3 and sizes[-1] <= 3


@pytest.mark.parametrize("where", ["the model's own run", "one setting"])
def test_running_out_of_memory_halves_the_prompts(where: str, monkeypatch: pytest.MonkeyPatch):
    model = Model.load(tiny("gpt2"))
    parts, batch = nodes(model), examples(5).batch()
    gates, fallback = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    gates[1] = 0.5
    expected, rows = parts.measure(batch, gates, fallback), list[int]()
    of, name = (measuring, "reference") if where == "the model's own run" else (Model, "target_logits")
    own = getattr(of, name)

    def small(model: Model, given: Batch, *rest: Any, **more: Any) -> Any:
        rows.append(len(given))
        if len(given) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(model, given, *rest, **more)

    monkeypatch.setattr(of, name, small)
    with pytest.warns(UserWarning) as said:
        torch.testing.assert_close(parts.measure(batch, gates, fallback), expected, atol=1e-6, rtol=0)
    assert [f"{n} prompts at once: going on with {n // 2}" in "".join(str(one.message) for one in said) for n in (5, 2)] == [
        True,
        True,
    ]
    assert max(rows) == 5 and rows[-1] == 1
    rows.clear()
    parts.measure(batch, gates, fallback)  # it is not tried again
    assert max(rows) == 1


def test_any_other_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch):
    model = Model.load(tiny("gpt2"))
    parts, batch = nodes(model), examples(3).batch()

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(Model, "target_logits", broken)
    with pytest.raises(RuntimeError, match="something else"):
        parts.measure(batch, parts.closed(2), parts.fallback("zero"))


@pytest.mark.parametrize("kind", KIND)
def test_there_are_parts_of_every_kind(kind: str):
    """So that the conformance above never passes for want of parts."""
    parts = parts_at(model_of("llama"), kind, ())
    assert parts is not None and len(parts.labels) >= model_of("llama").layers


def test_a_model_that_fails_the_proof_runs_whole_and_says_so(monkeypatch: pytest.MonkeyPatch):
    """Keys and values that are not kept right: caught at the first measure, named, and the numbers are those of whole runs."""
    model = Model.load(tiny("llama"))
    parts, batch = nodes(model), examples(3).batch()
    gates, fallback = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    options = Start.options

    def wrong(self: Start, settings: int) -> dict[str, object]:
        return options(replace(self, prefix=tuple((keys * 2, values) for keys, values in self.prefix)), settings)

    monkeypatch.setattr(Start, "options", wrong)
    with pytest.warns(UserWarning, match="logits differ by"):
        values = parts.measure(batch, gates, fallback)
    with torch.no_grad():
        torch.testing.assert_close(values, plainly(parts, batch, gates, fallback), atol=0, rtol=0)
