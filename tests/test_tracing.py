"""Causal tracing: equal to hooks of the test's own, and what must come back comes back."""

import pytest
import torch

import patchclamp as pc
from cases import tiny
from patchclamp.errors import GateError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts.compiling import windows
from patchclamp.tracing import trace
from test_parts import examples


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_states_put_back_by_hooks_of_the_tests_own(family: str):
    """Independent code: noise at the first block's input, each block's clean output put back at one column. Tolerance 1e-5."""
    model, some = Model.load(tiny(family)), examples(4, lengths=(7, 5))
    found = trace(model, some, positions=("fact", "end"), subject="fact", draws=2, seed=3, metric="log_probability")
    batch, blocks, metric = some.batch(), [layer.block for layer in model.anatomy.layers], METRICS["log_probability"]
    clean: dict[int, torch.Tensor] = {}

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def run(*hooks) -> torch.Tensor:
        with torch.no_grad():
            out = model.hf(
                input_ids=batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids, use_cache=False
            )
        for hook in hooks:
            hook.remove()
        return metric(out.logits[batch.target_row, batch.target_position][None], batch)[0]

    kept = [
        block.register_forward_hook(lambda m, a, o, n=n: clean.update({n: first(o).clone()})) for n, block in enumerate(blocks)
    ]
    plain = run(*kept)
    deviation = 3 * float(model.hf.get_input_embeddings().weight.detach().std())
    chance = torch.Generator().manual_seed(3)
    noises = [
        torch.randn(*batch.tokens.shape, model.width, generator=chance) * deviation * batch.columns("fact")[..., None]
        for _ in range(2)
    ]

    def blurred(noise):
        def hook(_, args, kwargs):
            return (
                ((args[0] + noise, *args[1:]), kwargs)
                if args
                else (args, {**kwargs, "hidden_states": kwargs["hidden_states"] + noise})
            )

        return blocks[0].register_forward_pre_hook(hook, with_kwargs=True)

    def restored(layer, where):
        def hook(_, args, output):
            value = torch.where(batch.columns(where)[..., None], clean[layer], first(output))
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return blocks[layer].register_forward_hook(hook)

    base = sum(run(blurred(noise)) for noise in noises) / 2
    assert found.clean.mean == pytest.approx(float(plain.mean()), abs=1e-5)
    assert found.blurred.mean == pytest.approx(float(base.mean()), abs=1e-5)
    for layer in range(model.layers):
        for where in ("fact", "end"):
            back = sum(run(blurred(noise), restored(layer, where)) for noise in noises) / 2
            expected = float((back - base).mean())
            assert found.effects[f"L{layer}.resid.post@{where}"]["score"] == pytest.approx(expected, abs=1e-5), (layer, where)


def test_everything_back_is_everything():
    """The last layer's state at the answer position carries the whole effect; the first layer's at the subject does, too."""
    model, some = Model.load(tiny("llama")), examples(6)
    found = trace(model, some, positions=("fact", "end"), subject="fact", draws=3, metric="log_probability")
    assert found.effects[f"L{model.layers - 1}.resid.post@end"]["score"] == pytest.approx(found.total, abs=1e-5)
    assert found.grid().shape == (model.layers, 3)
    whole = trace(model, some, ["L0.resid.pre"], positions=("fact",), subject="fact", draws=3, metric="log_probability")
    assert whole.effects["L0.resid.pre@fact"]["score"] == pytest.approx(found.total, abs=1e-5)


def test_a_window_holds_its_neighbours():
    model, some = Model.load(tiny("llama")), examples(4)
    alone, wide = (
        trace(model, some, ["L*.mlp.write"], ("fact",), subject="fact", draws=1, window=width)
        for width in (1, 2 * model.layers + 1)
    )
    scores = wide.effects.values()
    assert max(scores) == pytest.approx(min(scores), abs=1e-7), "a window over all layers is one setting"
    assert alone.effects.values().tolist() != scores.tolist()


def test_what_cannot_be_traced_is_said():
    model, some = Model.load(tiny("llama")), examples(4)
    with pytest.raises(GateError, match="names no such span"):
        trace(model, some)
    with pytest.raises(GateError, match="1 or more"):
        trace(model, some, subject="fact", draws=0)
    with pytest.raises(GateError, match="embedding has a gate"):
        pc.nodes(model).under(torch.zeros(1, 1, 1))


def test_windows_are_those_of_the_authors():
    """Their range: max(0, layer - window // 2) to min(layers, layer - (-window // 2)), the end not in it."""
    model = Model.load(tiny("llama"))
    parts = pc.gated(model, ["L*.mlp.write"])
    for width in (1, 2, 3, 4):
        for layer, gates in enumerate(windows(parts.labels, width)[:, 0, 0]):
            inside = range(max(0, layer - width // 2), min(model.layers, layer - (-width // 2)))
            assert (gates == 0).nonzero()[:, 0].tolist() == list(inside)
