"""Clamps of values and patterns: against loops of the tests' own, finite differences, and a model whose weights say the same."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import cases
from patchclamp.edits import Put, Scale, Zero
from patchclamp.errors import SiteError, TrainingError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Rows, Training, next_token, train
from patchclamp.training.clamp import joined
from patchclamp.training.clamps import Ablate, Copy, Forbid, Force, Hold, Schedule

TOKENS = torch.tensor([[5, 7, 5, 9, 7, 5, 7], [3, 3, 4, 8, 3, 4, 6]])
ROWS = Rows(TOKENS, torch.ones(2, 7))


@dataclass(frozen=True)
class Repeats:
    """Random tokens said twice."""

    name: str = "repeats"
    half: int = 5

    def rows(self, step: int, count: int) -> Rows:
        draw = torch.Generator().manual_seed(1000 + step)
        first = torch.randint(1, 20, (count, self.half), generator=draw)
        return Rows(torch.cat([first, first], 1), torch.ones(count, 2 * self.half))


def small(seed: int = 0, dtype: torch.dtype = torch.float32, **more: object) -> Model:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    hf = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **more))
    return Model.load(hf.to(dtype).eval())


# --- schedules


def test_a_schedule_is_its_formula():
    at = range(8)
    assert [Schedule(2, 6, 0.5)(t) for t in at] == [0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert [Schedule(2, 6, 1.0, "up")(t) for t in at] == [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]
    assert [Schedule(2, 6, 1.0, "down")(t) for t in at] == [0, 0, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [Schedule(3)(t) for t in at] == [0, 0, 0, 1, 1, 1, 1, 1]

    def every_other(step: int) -> float:
        return step % 2

    blinking = Schedule(1, 5, 0.5, every_other)
    assert [blinking(t) for t in at] == [0, 0.5, 0, 0.5, 0, 0, 0, 0]
    assert repr(blinking) == "Schedule(start=1, stop=5, strength=0.5, shape='every_other')"


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"start": 3, "stop": 3}, "end after"),
        ({"strength": 1.5}, "strength 1.5"),
        ({"shape": "sine"}, "constant, up, down"),
        ({"shape": "up"}, "needs the step"),
        ({"shape": lambda step: 1.0}, "no name"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(numbers: dict, said: str):
    with pytest.raises(TrainingError, match=said):
        Schedule(**numbers)


def test_a_function_of_the_step_must_stay_between_0_and_1():
    def wild(step: int) -> float:
        return 3.0

    with pytest.raises(TrainingError, match=r"gave 3\.0 at step 4"):
        Schedule(shape=wild)(4)


# --- patterns


def wanted(name: str, tokens: list[int], embedding: torch.Tensor | None = None) -> torch.Tensor:
    """A target pattern, by loops."""
    n = len(tokens)
    target = torch.zeros(n, n)
    for i in range(n):
        if name == "uniform":
            target[i, : i + 1] = 1 / (i + 1)
        elif name == "match" and i > 0:
            assert embedding is not None
            cosines = [torch.cosine_similarity(embedding[tokens[i]], embedding[tokens[j - 1]], dim=0) for j in range(1, i + 1)]
            target[i, 1 : i + 1] = torch.softmax(torch.stack(cosines) / 0.5, 0)
        else:
            before = [k for k in range(i) if tokens[k] == tokens[i]]
            at = {"previous": max(i - 1, 0), "first": 0, "self": i, "match": 0, "induction": before[-1] + 1 if before else 0}
            target[i, at[name]] = 1
    return target


@pytest.mark.parametrize("family", cases.CONFIGS)
def test_a_forced_head_has_the_pattern_and_the_others_keep_theirs(family: str):
    """In layer 0, where nothing else has changed; tolerance of float32 softmax."""
    model = cases.model_of(family)
    plain = model.record(TOKENS, "L0.pattern")[Site("pattern", 0)]
    for name in ("previous", "induction", "first", "self", "uniform"):
        clamp = Force("L0.h1.pattern", name, Schedule(2, 4, 0.25))
        assert clamp.edits(model, 1, ROWS) == {} and clamp.edits(model, 4, ROWS) == {}
        found = model.record(TOKENS, "L0.pattern", clamp.edits(model, 2, ROWS))[Site("pattern", 0)]
        target = torch.stack([wanted(name, row.tolist()) for row in TOKENS])
        torch.testing.assert_close(found[:, 1], 0.75 * plain[:, 1] + 0.25 * target, atol=2e-6, rtol=0)
        assert torch.equal(found[:, [0, 2, 3]], plain[:, [0, 2, 3]])
        held = model.record(TOKENS, "L1.pattern", Force("L1.h*.pattern", name).edits(model, 0, ROWS))[Site("pattern", 1)]
        assert torch.equal(held, target[:, None].expand_as(held))


@pytest.mark.parametrize("family", cases.CONFIGS)
def test_a_forbidden_place_is_empty_and_the_rest_renormalised(family: str):
    """pattern * (1 - s m), over 1 - s * what was there (of all that softmax saw, a sink included)."""
    model = cases.model_of(family)
    plain = model.record(TOKENS, "L0.pattern")[Site("pattern", 0)]
    for name, strength in (("previous", 1.0), ("previous", 0.5), ("induction", 1.0), ("first", 1.0), ("self", 0.3)):
        found = model.record(
            TOKENS, "L0.pattern", Forbid("L0.h2.pattern", name, Schedule(strength=strength)).edits(model, 0, ROWS)
        )
        now = found[Site("pattern", 0)]
        for row, tokens in enumerate(TOKENS.tolist()):
            for i in range(1, len(tokens)):
                before = [k for k in range(i) if tokens[k] == tokens[i]]
                if name == "induction" and not before:
                    torch.testing.assert_close(now[row, 2, i], plain[row, 2, i], atol=1e-6, rtol=0)
                    continue
                at = {"previous": i - 1, "first": 0, "self": i, "induction": before[-1] + 1 if before else -1}[name]
                share = torch.ones(len(tokens))
                share[at] = 1 - strength
                kept = plain[row, 2, i] * share / (1 - strength * plain[row, 2, i, at])
                torch.testing.assert_close(now[row, 2, i], kept, atol=3e-6, rtol=0)
        assert torch.equal(now[:, 2, 0], plain[:, 2, 0])
        assert torch.equal(now[:, [0, 1, 3]], plain[:, [0, 1, 3]])


def test_an_induction_pattern_may_leave_new_tokens_free():
    model = cases.model_of("llama")
    plain = model.record(TOKENS, "L0.pattern")[Site("pattern", 0)]
    found = model.record(TOKENS, "L0.pattern", Force("L0.h0.pattern", "induction", otherwise="free").edits(model, 0, ROWS))
    for row, tokens in enumerate(TOKENS.tolist()):
        for i, token in enumerate(tokens):
            seen = token in tokens[:i]
            expected = wanted("induction", tokens)[i] if seen else plain[row, 0, i]
            assert torch.equal(found[Site("pattern", 0)][row, 0, i], expected)


def test_a_match_head_attends_behind_what_is_alike():
    model = cases.model_of("qwen2")
    embedding = model.hf.get_input_embeddings().weight.detach()
    soft = model.record(TOKENS, "L0.h3.pattern", Force("L0.h3.pattern", "match", temperature=0.5).edits(model, 0, ROWS))
    expected = torch.stack([wanted("match", row.tolist(), embedding) for row in TOKENS])
    torch.testing.assert_close(soft[Site("pattern", 0, 3)], expected, atol=1e-6, rtol=0)
    hard = model.record(TOKENS, "L0.h3.pattern", Force("L0.h3.pattern", "match").edits(model, 0, ROWS))[Site("pattern", 0, 3)]
    for row, tokens in enumerate(TOKENS.tolist()):
        for i in range(1, len(tokens)):
            if before := [k for k in range(i) if tokens[k] == tokens[i]]:  # shared among all earlier occurrences
                assert hard[row, i, [k + 1 for k in before]].tolist() == pytest.approx([1 / len(before)] * len(before))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token(side: str):
    """The real part of a padded row is forced, or forbidden, as it is without padding; the padding id is a real token's."""
    model = cases.model_of("gpt2")
    rows = [[5, 7, 5, 9, 7], [3, 5, 3, 4, 8, 3, 4]]
    shift = 2 if side == "left" else 0
    tokens = torch.tensor([[3, 3, *rows[0]] if side == "left" else [*rows[0], 3, 3], rows[1]])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = mask[0, -2:] = False
    mask[0, shift : shift + 5] = True
    padded, alone = Rows(tokens, mask.float(), mask), Rows(torch.tensor(rows[:1]), torch.ones(1, 5))
    clamps = [Force("L0.h1.pattern", n, temperature=0.5) for n in ("previous", "induction", "match", "first", "self", "uniform")]
    clamps += [Forbid("L0.h1.pattern", name) for name in ("previous", "induction", "first", "self")]
    at = Site("pattern", 0, 1)
    for clamp in clamps:
        real = slice(shift, shift + 5)
        found = model.record(padded.batch, at, clamp.edits(model, 0, padded))[at][0]
        expected = model.record(alone.batch, at, clamp.edits(model, 0, alone))[at][0]
        torch.testing.assert_close(found[real, real], expected, atol=1e-6, rtol=0)
        assert found.isfinite().all()


def test_a_pattern_is_forced_at_one_position_only():
    model = cases.model_of("gpt2")
    plain = model.record(TOKENS, "L0.pattern")[Site("pattern", 0)]
    found = model.record(TOKENS, "L0.pattern", Force("L0.h1.pattern@-1", "self").edits(model, 0, ROWS))[Site("pattern", 0)]
    assert found[:, 1, -1, -1].tolist() == [1, 1] and torch.equal(found[:, 1, :-1], plain[:, 1, :-1])


@pytest.mark.parametrize("clamp", [Force("L0.h0", "self"), Forbid("L0.mlp", "first"), Ablate("L0.h0.pattern")])
def test_what_is_no_pattern_or_no_part_is_refused_by_name(clamp: Force | Forbid | Ablate):
    with pytest.raises(TrainingError, match=r"L0\."):
        clamp.edits(cases.model_of("gpt2"), 0, ROWS)


def test_sites_that_a_model_lacks_are_refused_with_the_reason():
    for clamp in (Force("L7.h0.pattern", "self"), Ablate("L0.h9"), Hold("L0.router", Zero())):
        with pytest.raises(SiteError, match="has no"):
            clamp.edits(cases.model_of("gpt2"), 0, ROWS)


@pytest.mark.parametrize("wrong", [lambda: Force("L0.h0.pattern", "next"), lambda: Forbid("L0.h0.pattern", "uniform"),
                                   lambda: Ablate("L0.h0", "noise"), lambda: Force("L0.h0.pattern", "match", temperature=-1.0)])  # fmt: skip
def test_unknown_names_are_refused(wrong):
    with pytest.raises(TrainingError, match="choose"):
        wrong()


# --- values


def test_an_ablated_head_is_a_model_without_its_output_columns():
    model = small()
    cut = Model.load(copy.deepcopy(model.hf))
    with torch.no_grad():
        cut.hf.transformer.h[1].attn.c_proj.weight[:8] = 0
    found = model.run(TOKENS, Ablate("L1.h0").edits(model, 0, ROWS))
    torch.testing.assert_close(found, cut.run(TOKENS), atol=1e-6, rtol=0)


def test_half_and_mean_ablations_are_their_formulas():
    model = small()
    z = model.record(TOKENS, "L1.z")[Site("z", 1)]
    for how in ("zero", "mean"):
        edits = Ablate("L1.h1", how, Schedule(strength=0.75)).edits(model, 0, ROWS)
        found = model.record(TOKENS, "L1.z", edits)[Site("z", 1)]
        fallback = z[:, :, 1].mean((0, 1)) if how == "mean" else torch.zeros(8)
        torch.testing.assert_close(found[:, :, 1], 0.25 * z[:, :, 1] + 0.75 * fallback, atol=1e-7, rtol=1e-6)
        assert torch.equal(found[:, :, 0], z[:, :, 0])


def test_any_edit_is_held_at_any_site_by_its_strength():
    model = cases.model_of("mixtral")
    for site in (
        "embed",
        "L0.q",
        "L0.kv1.k",
        "L1.kv0.v",
        "L1.h2.scores",
        "L0.resid.mid",
        "L1.mlp",
        "L1.mlp.e2",
        "L0.attn.write",
        "final",
    ):
        clamp = Hold(site, Scale(0.5), Schedule(strength=0.5))
        at = Site.parse(site)
        plain = model.record(TOKENS, at)[at]
        found = model.record(TOKENS, at, clamp.edits(model, 0, ROWS))[at]
        masked = plain < -1e30
        torch.testing.assert_close(found[~masked], 0.75 * plain[~masked], atol=1e-6, rtol=1e-5)
        assert torch.equal(found[masked], plain[masked])


def test_an_edit_that_tells_nothing_of_itself_needs_a_name():
    with pytest.raises(TrainingError, match="name="):
        Hold("L0.mlp", Put(torch.zeros(16)))
    assert "nothing" in repr(Hold("L0.mlp", Put(torch.zeros(16)), name="nothing"))
    assert repr(Hold("L0.mlp", Scale(0.5))) != repr(Hold("L0.mlp", Scale(0.25)))


def test_copying_says_what_a_head_attends_to():
    model = cases.model_of("llama")
    plain = model.run(TOKENS)
    pattern = model.record(TOKENS, "L1.pattern")[Site("pattern", 1)]
    found = model.run(TOKENS, Copy(("L1.h1.pattern", "L1.h2.pattern"), 3.0, Schedule(strength=0.5)).edits(model, 0, ROWS))
    expected = plain.clone()
    for row, tokens in enumerate(TOKENS.tolist()):
        for i in range(len(tokens)):
            for j, token in enumerate(tokens):
                expected[row, i, token] += 1.5 * (pattern[row, 1, i, j] + pattern[row, 2, i, j])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_head_that_copies_learns_where_to_look():
    """With its output said, gradients reach queries and keys though its own output projection is zero."""
    model = small()
    with torch.no_grad():
        model.hf.transformer.h[1].attn.c_proj.weight.zero_()
    with model.editing(Copy("L1.h0.pattern").edits(model, 0, ROWS), TOKENS):
        next_token(model.hf(input_ids=TOKENS, use_cache=False).logits, ROWS).backward()
    fused = model.hf.transformer.h[1].attn.c_attn.weight.grad
    assert fused[:, :8].any() and fused[:, 16:24].any() and not fused[:, 8:16].any()  # head 0's queries and keys, not head 1's


def test_several_clamps_share_hooks_and_keep_their_order():
    """Scaled, then put to 1, then halved: the same as sessions one inside the other, whatever shares a mapping."""
    model = cases.model_of("gpt2")
    ones = Put(torch.ones(1))
    each = [
        {Site.parse("L0.h0"): Scale(3.0), Site.parse("L0.z"): Scale(0.5)},
        {Site.parse("L0.h0"): ones},
        {Site.parse("L1.mlp"): [Scale(2.0), Scale(0.25)]},
        {Site.parse("L0.h1"): Zero(), Site.parse("L1.mlp"): Scale(4.0)},
    ]
    with torch.no_grad(), joined(model, each, ROWS):
        together = model.hf(input_ids=TOKENS, use_cache=False).logits
    with torch.no_grad(), model.editing(each[0], TOKENS), model.editing(each[1], TOKENS), model.editing(each[2], TOKENS):  # noqa: SIM117
        with model.editing(each[3], TOKENS):
            nested = model.hf(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(together, nested)
    with torch.no_grad(), joined(model, [each[1], each[0]], ROWS):
        assert not torch.equal(model.hf(input_ids=TOKENS, use_cache=False).logits, together)


# --- in the graph


CLAMPS = (
    Force("L0.h0.pattern", "previous", Schedule(strength=0.6)),
    Forbid("L1.h1.pattern", "first", Schedule(strength=0.5)),
    Ablate("L1.h0", "zero", Schedule(strength=0.3)),
    Hold("L0.mlp", Scale(0.5), Schedule(strength=0.5)),
)


def gradients(model: Model, rows: Rows = ROWS) -> dict[str, torch.Tensor]:
    model.hf.zero_grad()
    edits = {site: edit for clamp in CLAMPS for site, edit in clamp.edits(model, 0, rows).items()}
    with model.editing(edits, rows.tokens):
        next_token(model.hf(input_ids=rows.tokens, use_cache=False).logits, rows).backward()
    return {name: p.grad.clone() for name, p in model.hf.named_parameters()}


def test_gradients_of_a_clamped_model_are_differences_of_its_loss():
    """In float64, central differences of 1e-5 along random directions: to 1e-6 of the largest (the loss itself is float32)."""
    model = small(dtype=torch.float64)
    found = gradients(model)
    edits = {site: edit for clamp in CLAMPS for site, edit in clamp.edits(model, 0, ROWS).items()}

    def loss() -> float:
        logits = model.run(TOKENS, edits)[:, :-1].log_softmax(-1)
        return float(-logits.gather(2, TOKENS[:, 1:, None]).mean())

    torch.manual_seed(0)
    for name, weight in model.hf.named_parameters():
        along = torch.randn_like(weight)
        with torch.no_grad():
            weight.add_(1e-5 * along)
            up = loss()
            weight.sub_(2e-5 * along)
            down = loss()
            weight.add_(1e-5 * along)
        assert (up - down) / 2e-5 == pytest.approx(float((found[name] * along).sum()), abs=2e-6), name


def test_gradients_are_the_same_where_activations_are_computed_again():
    model = small()
    plain = gradients(model)
    model.hf.train()
    model.hf.activation_checkpointing_enable()
    again = gradients(model)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, atol=1e-7, rtol=1e-5)


def test_a_forced_pattern_teaches_values_and_not_queries():
    model = small()
    edits = Force("L1.pattern", "previous").edits(model, 0, ROWS)
    with model.editing(edits, TOKENS):
        next_token(model.hf(input_ids=TOKENS, use_cache=False).logits, ROWS).backward()
    fused = model.hf.transformer.h[1].attn.c_attn.weight.grad
    assert not fused[:, :32].any() and fused[:, 32:].any()


def test_pieces_of_an_update_are_clamped_as_the_whole(tmp_path):
    """To 2e-6, for AdamW divides by gradients that differ by rounding."""
    ends = [
        train(small(), Repeats(), Training(4, batch=6, accumulate=n, rate=1e-3), tmp_path / str(n), clamps=CLAMPS).model.hf
        for n in (1, 3)
    ]
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_a_clamp_acts_in_its_steps_alone(tmp_path):
    """Before it begins, the run is the unclamped one bit for bit; from there on it is another."""

    def go(name: str, *clamps: object) -> list[float]:
        return train(small(), Repeats(), Training(6, batch=4), tmp_path / name, clamps=clamps).curve("loss")["value"].to_list()

    plain = go("plain")
    late = go("late", Ablate("L0.h*", schedule=Schedule(3, 5)))
    assert late[:3] == plain[:3] and late[3] != plain[3]
    assert go("never", Ablate("L0.h*", schedule=Schedule(start=99))) == plain


def test_a_run_knows_its_clamps(tmp_path):
    first = (Force("L0.h0.pattern", "previous"),)
    train(small(), Repeats(), Training(1, batch=4), tmp_path, clamps=first)
    with pytest.raises(TrainingError, match="another training"):
        train(
            small(),
            Repeats(),
            Training(1, batch=4),
            tmp_path,
            clamps=(Force("L0.h0.pattern", "previous", Schedule(strength=0.5)),),
        )
