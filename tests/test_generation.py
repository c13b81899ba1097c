"""Generation: equal to transformers' own, alike with and without a cache whatever the edits, and edits where they say."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.edits import Add, Put, Scale, Zero
from patchclamp.errors import GateError, ModelError, NumericsError, SiteError
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.inputs import prompts_of, token_batch
from patchclamp.models.model import Model
from patchclamp.models.sampling import Sampler
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

FAMILY = pytest.mark.parametrize("name", CONFIGS)
ROWS = [[5, 11, 23, 42, 7, 31], [61, 17, 3], [90, 28, 28, 45]]


@cache
def model_of(name: str) -> Model:
    hf = tiny(name, seed=1)
    hf.generation_config.eos_token_id = None
    for config in (hf.config, getattr(hf.config, "text_config", hf.config)):
        config.eos_token_id = None
    return Model.load(hf)


def prompts() -> Batch:
    return token_batch(ROWS)


@FAMILY
def test_greedy_equals_transformers(name: str) -> None:
    model, batch = model_of(name), prompts()
    ours = model.generate(batch, max_new_tokens=6)
    theirs = model.hf.generate(
        input_ids=batch.tokens, attention_mask=batch.mask.long(), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.tensor(ours.tokens).tolist() == theirs[:, batch.tokens.shape[1] :].tolist()
    assert ours.prompts == tuple(map(tuple, ROWS)) and ours.texts == () and ours.ended == ("length",) * 3
    logits = model.run(torch.tensor([[*ROWS[1], *ours.tokens[1]]]))[0, 2:-1].log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(ours.tokens[1])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours.log_probabilities[1]), expected, atol=1e-4, rtol=1e-4)


class Bend:
    """An edit that depends on all it may see: phase, step, positions and mask."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        shape = (*seen.positions.shape, *[1] * (value.dim() - 2))
        strength = (1 + 0.05 * seen.positions.reshape(shape)) * (0.7 if seen.phase == "prompt" else 1.2 + 0.1 * seen.step)
        return torch.where(seen.mask.reshape(shape), value * strength, value)


class Mean:
    """An edit across positions: what it gives depends on which columns it is shown together."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        weight = seen.mask.to(value.dtype).reshape(*seen.mask.shape, *[1] * (value.dim() - 2))
        return 0.5 * value + 0.5 * (value * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


class Sharpen:
    """An edit of whole rows of a pattern, by query."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        assert value.shape[2] == seen.mask.shape[1]
        sharp = value.pow(1.5 + 0.1 * seen.step)
        return sharp / sharp.sum(-1, keepdim=True).clamp(min=1e-9)


SWAY = torch.randn(32, generator=torch.Generator().manual_seed(0))
EDITS: dict[str, dict[str, Any]] = {
    "z": {"L0.z": Bend(), "L1.h2": Mean(), "L1.h0@prompt": Zero(), "L1.h1@generation": Scale(0.2)},
    "mlp": {"L0.mlp": Bend(), "L1.mlp.write": Mean(), "L0.mlp.write@generation": Scale(0.5)},
    "resid": {"L1.resid.pre": Bend(), "L0.resid.post@-1": Add(SWAY), "L1.resid.post@generation": Add(SWAY, 0.5)},
    "pattern": {"L0.pattern": Sharpen(), "L1.h1.pattern@0": Zero(), "L1.h3.pattern@generation": Scale(0.3)},
    "scores": {"L0.h1.scores": Scale(0.5), "L1.scores": Scale(1.5)},
    "q": {"L0.q": Bend(), "L1.h0.q@prompt": Zero()},
    "k": {"L0.k": Bend(), "L1.kv0.k@1": Zero(), "L1.k": Mean()},
    "v": {"L0.v": Bend(), "L1.kv0.v@-1": Zero(), "L1.v@generation": Scale(1.5)},
    "ends": {"embed": Bend(), "final": Mean(), "logits": Bend()},
}


def parsed(edits: dict[str, Any]) -> Edits:
    return {Site.parse(text): edit for text, edit in edits.items()}


@cache
def unedited(name: str) -> Tensor:
    """Log-probabilities of what the model says when it is left alone."""
    return torch.tensor(model_of(name).generate(prompts(), max_new_tokens=4).log_probabilities)


@pytest.mark.parametrize("kind", EDITS)
@FAMILY
def test_cached_and_uncached_give_the_same(name: str, kind: str) -> None:
    model, edits = model_of(name), parsed(EDITS[kind])
    for on in ("all", "prompt", "generation"):
        cached, uncached = (model.generate(prompts(), edits, max_new_tokens=4, cache=c, on=on) for c in (True, False))
        assert cached.tokens == uncached.tokens
        one, two = torch.tensor(cached.log_probabilities), torch.tensor(uncached.log_probabilities)
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(one, unedited(name), atol=1e-4), f"the edits change nothing on {on}"


def test_what_an_edit_sees_does_not_depend_on_the_cache() -> None:
    model = model_of("llama")

    def log(kind: str, cache: bool) -> list[tuple[Any, ...]]:
        seen_: list[tuple[Any, ...]] = []

        def note(value: Tensor, seen: Seen, /) -> Tensor:
            axis = 2 if kind in ("scores", "pattern") else 1
            assert value.shape[axis] == seen.mask.shape[1] == seen.positions.shape[1]
            keys = value.shape[3] if axis == 2 else 0
            seen_.append((seen.phase, seen.step, seen.positions.tolist(), seen.mask.tolist(), keys))
            return value

        model.generate(prompts(), {Site(kind, 1): note}, max_new_tokens=3, cache=cache)
        return seen_

    for kind in ("z", "q", "pattern", "resid.mid"):
        cached = log(kind, True)
        assert [(phase, step) for phase, step, *_ in cached] == [("prompt", 0), ("generation", 1), ("generation", 2)]
        assert [row[2] for row in cached[1:]] == [[[6], [3], [4]], [[7], [4], [5]]]
        assert [row[4] for row in cached] == ([6, 7, 8] if kind == "pattern" else [0, 0, 0])
        # without a cache, the same calls again at every step
        assert log(kind, False) == cached[:1] + cached[:2] + cached[:3]
    assert log("k", True) == log("k", False)


def test_edits_may_read_earlier_sites() -> None:
    """An edit that wants to see an earlier site gets that site's own stretch, as edited."""
    model = model_of("llama")

    class Like:
        """Scale by the size of the embedding."""

        reads = (Site("embed"), Site("z", 0))

        def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
            size = seen.values[Site("embed")].norm(dim=-1)
            assert size.shape == seen.mask.shape and len(seen.values[Site("z", 0)]) == len(value)
            return value * size.reshape(*size.shape, *[1] * (value.dim() - 2))

    for site in (Site("mlp", 0), Site("z", 1), Site("k", 1), Site("v", 1)):
        cached, uncached = (model.generate(prompts(), {site: Like()}, max_new_tokens=4, cache=c) for c in (True, False))
        assert cached.tokens == uncached.tokens
        assert cached.tokens != model.generate(prompts(), max_new_tokens=4).tokens or site.layer == 1
    with pytest.raises(GateError, match=r"an edit at L0\.attn wants to see L1\.mlp, which is computed after it"):

        class Ahead(Like):
            reads = (Site("mlp", 1),)

        model.run(prompts(), {Site("attn", 0): Ahead()})


def test_steering_equals_a_hook_by_hand() -> None:
    """Adding a vector to every column, recomputed whole by hand."""
    model = model_of("llama")
    batch = token_batch([ROWS[0]])
    tokens = batch.tokens
    handle = model.hf.model.layers[0].register_forward_hook(lambda module, args, out: out + SWAY)
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, model.hf(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    handle.remove()
    for cached in (True, False):
        ours = model.generate(batch, {Site("resid.post", 0): Add(SWAY)}, max_new_tokens=5, cache=cached)
        assert list(ours.tokens[0]) == tokens[0, len(ROWS[0]) :].tolist()


def test_phases_by_hand() -> None:
    """The second token's distribution, from plain runs over prompt + token with the edit at the columns of one phase."""
    model, row = model_of("gpt2"), ROWS[0]
    edit = {Site("mlp", 0): Zero()}
    for on, columns in {"prompt": range(6), "generation": [6], "all": range(7)}.items():
        ours = model.generate(token_batch([row]), edit, max_new_tokens=2, on=on)
        start = model.run(torch.tensor([row]), {} if on == "generation" else edit)[0, -1].argmax().item()
        assert ours.tokens[0][0] == start
        batch = token_batch([[*row, start]])
        by_column = {Site("mlp", 0, position=column): Zero() for column in columns}
        expected = model.run(batch, by_column)[0, -1].log_softmax(-1)
        assert ours.tokens[0][1] == expected.argmax()
        assert ours.log_probabilities[0][1] == pytest.approx(expected.max().item(), abs=1e-5)


def test_positions_refer_to_the_prompt() -> None:
    model = model_of("llama")
    for text, same in {"L0.mlp@-1": "L0.mlp@5", "L0.mlp@prompt": "L0.mlp", "L0.mlp@end": "L0.mlp@-1"}.items():
        batch = token_batch([ROWS[0]])
        one = model.generate(batch, {Site.parse(text): Zero()}, max_new_tokens=4)
        two = model.generate(batch, {Site.parse(same): Zero()}, max_new_tokens=4, on="prompt")
        assert one == two, text
    with pytest.raises(SiteError, match="needs a batch"), model.editing({Site.parse("L0.mlp@2"): Zero()}):
        model.hf(input_ids=torch.tensor([ROWS[0]]))


# --- rows and their ends


def test_rows_end_each_for_itself() -> None:
    model = model_of("llama")
    free = model.generate(prompts(), max_new_tokens=8)
    end = free.tokens[1][2]
    ended = model.generate(prompts(), max_new_tokens=8, stop=[end])
    for row in range(3):
        tokens = list(free.tokens[row])
        cut = tokens.index(end) + 1 if end in tokens else 8
        assert list(ended.tokens[row]) == tokens[:cut]
        assert list(ended.log_probabilities[row]) == pytest.approx(free.log_probabilities[row][:cut], abs=1e-5)
        assert ended.ended[row] == ("stop" if end in tokens else "length")
    assert len(ended.tokens[1]) <= 3 and "length" in ended.ended


def test_end_of_sequence_tokens_of_the_model() -> None:
    hf = tiny("llama", seed=1)
    hf.generation_config.eos_token_id = None
    hf.config.eos_token_id = None
    model = Model.load(hf)
    free = model.generate(prompts(), max_new_tokens=6)
    hf.generation_config.eos_token_id = [free.tokens[0][0], free.tokens[2][3]]
    ended = model.generate(prompts(), max_new_tokens=6)
    assert ended.ended[0] == "end" and ended.tokens[0] == free.tokens[0][:1]
    hf.generation_config.eos_token_id = free.tokens[0][0]
    assert model.generate(token_batch(ROWS[:1]), max_new_tokens=6).tokens == (free.tokens[0][:1],)


def test_stop_strings(shared: Any) -> None:
    model = Model.load(shared / "models" / "stories260k-llama")
    free = model.generate("Once upon a time, there was a", max_new_tokens=30)
    word = free.texts[0].split()[3]
    ended = model.generate("Once upon a time, there was a", max_new_tokens=30, stop=[word])
    assert ended.ended == ("stop",) and ended.texts[0].endswith(word) and free.texts[0].startswith(ended.texts[0])
    assert str(ended) == ended.texts[0] and len(ended) == 1


def test_prompts_of_a_batch_are_cut_before_the_answer() -> None:
    batch = token_batch([[5, 11, 23, 42], [61, 17], [5, 11, 23, 43]])
    # rows hold prompt + answer: "end" is the last prompt token
    spans = {"end": torch.tensor([[1, 2], [2, 3], [1, 2]]), "first": torch.tensor([[0, 1], [2, 3], [0, 1]])}
    whole = Batch(**{**vars(batch), "spans": spans, "sign": torch.tensor([1.0, 1.0, -1.0]), "example": torch.tensor([0, 1, 0])})
    cut = prompts_of(whole)
    assert cut.tokens.tolist() == [[5, 11], [0, 61]]
    assert cut.spans["end"].tolist() == [[1, 2], [1, 2]] and cut.spans["first"].tolist() == [[0, 1], [1, 2]]


# --- sampling


def test_sampling_repeats_with_its_seed() -> None:
    model = model_of("llama")

    def drawn(seed: int, **options: Any) -> Any:
        return model.generate(prompts(), max_new_tokens=8, temperature=1.0, seed=seed, **options).tokens

    assert drawn(3) == drawn(3) == drawn(3, cache=False)
    assert drawn(3) != drawn(4)
    assert drawn(3, top_k=1) == model.generate(prompts(), max_new_tokens=8).tokens
    assert drawn(3, top_p=1e-6) == model.generate(prompts(), max_new_tokens=8).tokens


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.0]).expand(20000, -1)

    def shares(**options: Any) -> Tensor:
        sampler = Sampler(**options)
        return sampler(logits, sampler.generator()).bincount(minlength=5) / 20000

    torch.testing.assert_close(shares(temperature=1.0), logits[0].softmax(-1), atol=0.02, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)
    top = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf, 1.0]).softmax(-1)
    torch.testing.assert_close(shares(temperature=1.0, top_k=3), top, atol=0.02, rtol=0)
    # .52 + .19 + .19 + .07 + .03: the first two have .71
    nucleus = shares(temperature=1.0, top_p=0.6)
    assert int((nucleus > 0).sum()) == 2 and nucleus[0] == pytest.approx(0.73, abs=0.02)
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0, 0]


# --- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 was asked: it must be 0"),
        ({"top_k": 0}, "top_k=0 was asked: it must be 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0 was asked: it must be above 0 and at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 was asked"),
        ({"stop": ["."]}, "stop strings need a tokenizer"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((GateError, ModelError), match=message):
        model_of("llama").generate(prompts(), **options)


def test_what_cannot_be_generated_from() -> None:
    model = model_of("llama")
    with pytest.raises(ModelError, match="text was given, but this model came without a tokenizer"):
        model.generate("Once")
    with pytest.raises(ModelError, match="holds no tokens"):
        model.generate(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(GateError, match="shapes do not fit"):  # a patch of the prompt has no value for new tokens
        model.generate(prompts(), {Site("z", 0): Put(torch.zeros(3, 6, 4, 8))}, max_new_tokens=3)
    model.generate(prompts(), {Site("z", 0): Put(torch.zeros(3, 6, 4, 8))}, max_new_tokens=3, on="prompt")
    with pytest.raises(NumericsError, match="NaN logits while generating"):
        model.generate(prompts(), {Site("z", 0): Scale(float("nan"))})


def test_the_model_is_left_as_it_was() -> None:
    hf = tiny("gpt2", "sdpa").train()
    before = hf.state_dict()
    Model.load(hf).generate(prompts(), parsed(EDITS["pattern"]), max_new_tokens=2)
    assert hf.training and hf.config._attn_implementation == "sdpa" and all(m.training for m in hf.modules())
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


def test_text_keeps_its_first_blank(shared: Path) -> None:
    """SentencePiece drops a blank that starts what it decodes: new tokens are decoded behind their prompt."""
    model = Model.load(str(shared / "models/stories260k-llama"))
    made = model.generate("Once upon a time, there was a little girl named", max_new_tokens=3)
    assert made.texts[0].startswith(" ") and model.tokenizer.decode(list(made.tokens[0])).strip() == made.texts[0].strip()
