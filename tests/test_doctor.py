"""The doctor: healthy models pass, and each way in which a family's row can be wrong is caught by the invariant's name."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cases import CONFIGS, tiny
from patchclamp.errors import FamilyError
from patchclamp.models import families
from patchclamp.models.doctor import Diagnosis, examine
from patchclamp.models.model import Model

NAMES = [
    "every site fires", "logits are numbers", "residual stream is the sum", "pattern @ v = z", "patterns sum to one",
    "heads and bias are attention", "neurons make the MLP", "observing changes nothing", "identity edits change nothing",
    "logits come from the final norm", "no look-ahead", "padding is not seen", "edits take effect",
]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_healthy(name: str) -> None:
    found = examine(Model.load(tiny(name)))
    assert found.passed, str(found)
    assert [invariant.name for invariant in found.invariants] == NAMES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "falcon"])
def test_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    hf = tiny(name, dtype=dtype)
    if name == "gpt_oss":
        hf.set_experts_implementation("eager")  # the grouped kernel knows no float64
    found = examine(Model.load(hf))
    assert found.passed, str(found)


def test_a_mask_that_overflows_is_seen() -> None:
    """Llama's softmax is float32 whatever the model's precision: float64's least number is -inf there, and padding gives NaN."""
    found = examine(Model.load(tiny("llama", dtype=torch.float64)))
    assert [invariant.name for invariant in found.invariants if not invariant.passed] == ["padding is not seen"]


def broken(monkeypatch: pytest.MonkeyPatch, name: str, **change: Any) -> Any:
    """A model whose family's row is changed."""
    rows = tuple(replace(row, **change) if name in row.types else row for row in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", rows)
    return tiny(name)


@pytest.mark.parametrize(
    ("name", "change", "invariant"),
    [
        ("gemma2", {"attn_post": None}, "residual stream is the sum"),
        ("gemma3_text", {"mlp_post": None}, "residual stream is the sum"),
        ("granite", {"scale": None}, "residual stream is the sum"),
        ("llama", {"mlp": "mlp.act_fn"}, "residual stream is the sum"),
        ("llama", {"first": "post_attention_layernorm"}, "every site fires in every layer"),
        ("falcon", {"mlp_mutated": False}, "residual stream is the sum"),
        ("llama", {"output": "self_attn.q_proj"}, "pattern @ v = z"),
        ("llama", {"down": "mlp.up_proj"}, "neurons make the MLP"),
        ("llama", {"attention": "mlp"}, "every site fires in every layer"),
        ("opt", {"flat_mlp": False}, "residual stream is the sum"),
        ("mixtral", {"router": "mlp.experts"}, "every site fires in every layer"),
        ("gptj", {"interface": True}, "every site fires in every layer"),
        ("llama", {"output": "self_attn.out_proj"}, "has no 'self_attn.out_proj' (output projection)"),
    ],
)  # fmt: skip
def test_a_broken_row_is_refused_at_load(
    monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any], invariant: str
) -> None:
    hf = broken(monkeypatch, name, **change)
    with pytest.raises(FamilyError) as caught:
        Model.load(hf)
    assert invariant in str(caught.value)
    assert hf.config.model_type.partition("_")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "invariant"),
    [
        ("phi", {"parallel": lambda config: False, "first": "input_layernorm"}, "edits take effect"),
        ("llama", {"norm": "model.layers.0.input_layernorm"}, "logits come from the final norm"),
        ("llama", {"norm": "model.embed_tokens"}, "logits come from the final norm"),
        ("gpt2", {"attn": "attn.c_proj", "output": "attn.c_attn"}, "every site fires"),
    ],
)  # fmt: skip
def test_a_broken_row_is_seen_by_the_doctor(
    monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any], invariant: str
) -> None:
    healthy = Model.load(tiny(name))
    hf = broken(monkeypatch, name, **change)
    try:
        model = Model.load(hf)
    except FamilyError as error:  # so wrong that it does not load
        assert invariant in str(error) or "pattern @ v" in str(error)
        return
    found = examine(model)
    assert not found.passed
    assert [i.name for i in found.invariants if not i.passed] == [invariant]
    assert f"FAIL {invariant}" in str(found)
    assert examine(healthy).passed


def test_a_heads_bias_that_is_not_understood() -> None:
    """Attention whose output projection is not linear: its heads' writes do not sum to what it writes."""
    hf = tiny("llama")

    class Bent(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).tanh()

    hf.model.layers[1].self_attn.o_proj = Bent(hf.model.layers[1].self_attn.o_proj)
    found = examine(Model.load(hf))
    failed = [invariant for invariant in found.invariants if not invariant.passed]
    assert [(invariant.name, invariant.where) for invariant in failed] == [("heads and bias are attention", "L1")]


def test_look_ahead_is_seen() -> None:
    """A model that sees the next token through a hole in its mask."""
    hf = tiny("llama")
    attend = hf.model.layers[1].self_attn.forward

    def leaky(hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        shifted = hidden_states + 0.1 * hidden_states.roll(-1, 1)
        return attend(shifted, *args, **options)

    hf.model.layers[1].self_attn.forward = leaky
    found = examine(Model.load(hf))
    assert [i.name for i in found.invariants if not i.passed] == ["no look-ahead", "padding is not seen"]


def test_positions_that_count_padding_are_seen() -> None:
    hf = tiny("gpt2")
    inner = hf.transformer.forward

    def forgetful(*args: Any, position_ids: Any = None, **options: Any) -> Any:
        return inner(*args, **options)

    hf.transformer.forward = forgetful
    found = examine(Model.load(hf))
    assert [i.name for i in found.invariants if not i.passed] == ["padding is not seen"]


def test_idle_parts_are_not_a_fault() -> None:
    hf = tiny("llama")
    with torch.no_grad():
        hf.model.layers[0].self_attn.v_proj.weight.zero_()
        hf.model.layers[1].mlp.down_proj.weight.zero_()
        hf.model.layers[1].self_attn.q_proj.weight.zero_()
    assert examine(Model.load(hf)).passed


def test_weights_that_hold_nan_are_named_as_such() -> None:
    hf = tiny("llama")
    with torch.no_grad():
        hf.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    found = examine(Model.load(hf))
    failed = [invariant.name for invariant in found.invariants if not invariant.passed]
    assert "logits are numbers" in failed


def test_what_is_printed() -> None:
    found = examine(Model.load(tiny("gpt2")))
    assert isinstance(found, Diagnosis)
    lines = str(found).splitlines()
    assert lines[0] == "GPT2LMHeadModel: gpt2, understood"
    assert [line[5 : 5 + len(name)] for line, name in zip(lines[1:], NAMES, strict=True)] == NAMES
    rows = found.rows()
    assert [row["invariant"] for row in rows] == NAMES
    assert all(row["why"] and row["about"] and row["passed"] is True for row in rows)
