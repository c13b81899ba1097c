"""Path patching: equal to hooks of the tests' own, to closed edges, and to closed nodes where all paths are meant."""

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, model_of
from patchclamp.errors import GateError, SiteError
from patchclamp.methods import attribute
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import edges, nodes
from patchclamp.paths import BETWEEN, path_patching
from patchclamp.zoo import wired
from test_parts import examples

DIFF = METRICS["logit_diff"]


def values(scores) -> dict[str, float]:
    return dict(zip(map(str, scores.sites), scores.values(), strict=True))


class Hooked:
    """Runs of GPT-2 with this file's own hooks on its modules: heads and MLPs set, c_attn, MLP or ln_f reading another stream."""

    def __init__(self, hf, batch):
        self.hf, self.batch, self.handles = hf, batch, []

    def run(self, tokens: Tensor, z=None, mlp=None, reads=None) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Metric per example, z and MLP outputs by name, streams by place."""
        kept, streams, reads = dict[str, Tensor](), dict[str, Tensor](), reads or {}
        handles = []

        def before(module, change):
            handles.append(module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:])))

        def after(module, change):
            handles.append(module.register_forward_hook(lambda m, args, out: change(out)))

        def heads(number: int, value: Tensor) -> Tensor:
            parts = [*value.chunk(4, -1)]
            for head in range(4):
                name = f"L{number}.h{head}"
                parts[head] = (z or {}).get(name, parts[head])
                kept[name] = parts[head]
            return torch.cat(parts, -1)

        def projected(number: int, block, value: Tensor) -> Tensor:
            out = value.clone()
            for name, stream in reads.items():
                layer, _, unit = name.partition(".")
                if layer == f"L{number}" and unit != "mlp":
                    slot, head = unit[-1], int(unit.partition(".")[0].lstrip("hkv"))
                    at = "qkv".index(slot) * 32 + head * 8
                    normed = block.ln_1(stream)
                    out[..., at : at + 8] = (normed @ block.attn.c_attn.weight + block.attn.c_attn.bias)[..., at : at + 8]
            return out

        def written(number: int, value: Tensor) -> Tensor:
            value = (mlp or {}).get(f"L{number}.mlp", value)
            kept[f"L{number}.mlp"] = value
            return value

        def seen(place: str, value: Tensor) -> Tensor:
            streams[place] = value
            return value

        for n, block in enumerate(self.hf.transformer.h):
            before(block, lambda x, n=n: seen(f"L{n}.pre", x))
            before(block.ln_2, lambda x, n=n: reads.get(f"L{n}.mlp", seen(f"L{n}.mid", x)))
            before(block.attn.c_proj, lambda x, n=n: heads(n, x))
            after(block.attn.c_attn, lambda x, n=n, b=block: projected(n, b, x))
            after(block.mlp, lambda x, n=n: written(n, x))
        before(self.hf.transformer.ln_f, lambda x: reads.get("logits", seen("post", x)))
        try:
            with torch.no_grad():
                logits = self.hf(tokens, attention_mask=self.batch.mask.long(), position_ids=self.batch.position_ids).logits
        finally:
            for handle in handles:
                handle.remove()
        return DIFF(logits[self.batch.target_row, self.batch.target_position][None], self.batch)[0], kept, streams


def stream_of(receiver: str) -> str:
    layer = receiver.partition(".")[0]
    return "post" if receiver == "logits" else f"{layer}.mid" if receiver.endswith("mlp") else f"{layer}.pre"


@pytest.mark.parametrize("between", BETWEEN)
def test_two_runs_by_hooks_of_the_tests_own(between: str):
    """GPT-2 in float64: everything to 1e-10."""
    model, some = model_of("gpt2", dtype=torch.float64), examples(3, lengths=(7, 5))
    batch = some.batch()
    hooked = Hooked(model.hf, batch)
    receivers = ("L1.h2.q", "L1.kv0.k", "L1.kv3.v", "L1.mlp", "L0.mlp", "logits")
    senders = ("L0.h1", "L0.h3", "L0.mlp", "L1.h0")
    found = values(path_patching(model, some, senders, receivers, between=between))
    opened, own, streams = hooked.run(batch.tokens)
    _, corrupt, _ = hooked.run(batch.corrupt)
    heads = {name: value for name, value in own.items() if not name.endswith("mlp")}
    checked = 0
    for sender in senders:
        kind = {"mlp": {sender: corrupt[sender]}} if sender.endswith("mlp") else {"z": {sender: corrupt[sender]}}
        if between == "mlps":
            kind["z"] = heads | kind.get("z", {})
        if between == "frozen":
            layer, head = model.hf.transformer.h[int(sender[1])], int(sender[-1]) if "h" in sender else 0
            weights = torch.eye(32).double() if sender.endswith("mlp") else layer.attn.c_proj.weight[8 * head : 8 * head + 8]
            moved = {place: value + (corrupt[sender] - own[sender]) @ weights.detach() for place, value in streams.items()}
        else:
            _, _, moved = hooked.run(batch.tokens, **kind)
        for receiver in receivers:
            if f"{sender}>{receiver}" not in found:
                continue
            second, _, _ = hooked.run(batch.tokens, reads={receiver: moved[stream_of(receiver)]})
            assert found[f"{sender}>{receiver}"] == pytest.approx(float((opened - second).mean()), abs=1e-10), (sender, receiver)
            checked += 1
    assert checked == len(found) == 6 + 6 + 5 + 2
    joint = values(path_patching(model, some, ["L0.h1"], receivers, between=between, joint=True))
    if between == "recomputed":
        _, _, moved = hooked.run(batch.tokens, z={"L0.h1": corrupt["L0.h1"]})
        second, _, _ = hooked.run(batch.tokens, reads={receiver: moved[stream_of(receiver)] for receiver in receivers})
        assert joint["L0.h1"] == pytest.approx(float((opened - second).mean()), abs=1e-10)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_variants_agree_where_they_must(name: str):
    """Frozen is one closed edge. All paths to the logits are the node. With no MLP between, MLPs do not matter."""
    model, some = model_of(name), examples(3, lengths=(7, 5))
    batch, receivers = some.batch(), ["logits", "L1.h1.q", "L1.kv0.v", "L1.mlp"]
    senders = ["embed", "L0.h*", "L0.mlp"]
    parts, both = edges(model), nodes(model)
    opened = parts.measure(batch, parts.open(), parts.fallback("resample"))
    frozen = path_patching(model, some, senders, receivers)
    gates = torch.cat([parts.without([edge]) for edge in frozen.sites])
    effects = (opened - parts.measure(batch, gates, parts.fallback("resample"))).double().mean(1)
    torch.testing.assert_close(torch.tensor(frozen.values()), effects, rtol=0, atol=1e-5)  # float32
    whole = values(path_patching(model, some, senders, ["logits"], between="recomputed"))
    for site in both.labels:
        if f"{site}>logits" in whole:
            closed = both.measure(batch, both.without([site]), both.fallback("resample"))
            assert whole[f"{site}>logits"] == pytest.approx(float((opened - closed).mean()), abs=1e-5)
    mlps = values(path_patching(model, some, ["L0.mlp"], ["L1.h1.q"], between="mlps"))
    assert mlps["L0.mlp>L1.h1.q"] == pytest.approx(values(frozen)["L0.mlp>L1.h1.q"], abs=1e-5)


def test_the_wired_induction_circuit_is_one_path():
    """The previous-token head acts through the induction head's keys, and the induction head on the logits."""
    made = wired("induction", "gpt2")
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    some = made.task.examples(made.tokenizer, 8, seed=3)
    truth = made.truth.effects["resample"]
    for between in BETWEEN:
        found = values(path_patching(model, some, ["L*.h*"], ["L1.h2.q", "L1.kv2.k", "L1.kv2.v", "logits"], between=between))
        expected = {"L0.h1>L1.kv2.k": truth["L0.h1"], "L1.h2>logits": truth["L1.h2"]}
        if between == "recomputed":
            expected["L0.h1>logits"] = truth["L0.h1"]
        for edge, value in found.items():
            assert value == pytest.approx(expected.get(edge, 0.0), abs=1e-4), (between, edge)


def test_denoising_is_the_mirror():
    """Swapped prompts, the same answers: what noising takes there, denoising gives, and the other way round."""
    model, some = model_of("llama"), examples(4)
    batch, parts = some.batch().swapped(), edges(model)
    found = path_patching(model, some, ["L0.h*"], ["logits"], direction="denoising")
    gates = torch.cat([parts.without([edge]) for edge in found.sites])
    rule = parts.fallback("resample")
    effects = (parts.measure(batch, gates, rule) - parts.measure(batch, parts.open(), rule)).double().mean(1)
    torch.testing.assert_close(torch.tensor(found.values()), effects, rtol=0, atol=1e-5)
    assert found.about["direction"] == "denoising" and "low" in found.table.columns


def test_company_and_memory_change_nothing():
    model, some = model_of("gemma2"), examples(5, lengths=(7, 5))
    for between in BETWEEN:
        whole = path_patching(model, some, ["embed", "L*.h*", "L*.mlp"], ["L1.h*.q", "logits"], between=between)
        small = path_patching(
            model, some, ["embed", "L*.h*", "L*.mlp"], ["L1.h*.q", "logits"], between=between, memory=1, batch_size=2
        )
        assert whole.sites == small.sites
        torch.testing.assert_close(torch.tensor(whole.values()), torch.tensor(small.values()), rtol=0, atol=1e-5)


def test_other_fallbacks_and_metrics():
    """What closing the one node gives, as all paths to the logits are meant."""
    model, some = model_of("qwen3"), examples(4)
    both = nodes(model)
    for kind, metric in (("zero", "kl"), ("mean", "log_probability"), ("resample", "probability")):
        rule = both.fallback(kind, fit=some)
        expected = values(attribute(both, some, rule, metric=metric))
        found = values(path_patching(model, some, ["L*.h*"], between="recomputed", fallback=kind, fit=some, metric=metric))
        for edge, value in found.items():
            assert value == pytest.approx(expected[edge.partition(">")[0]], abs=1e-5)


def test_what_cannot_be_asked_is_said():
    model, some = model_of("gpt2"), examples(2)
    with pytest.raises(GateError, match="no path leads"):
        path_patching(model, some, ["L1.h0"], ["L0.mlp"])
    with pytest.raises(GateError, match="not 'nothing'"):
        path_patching(model, some, between="nothing")
    with pytest.raises(SiteError, match="fits none"):
        path_patching(model, some, receivers=["L0.h1"])
    with pytest.raises(GateError, match="give the fit set"):
        path_patching(model, some, fallback="mean")
