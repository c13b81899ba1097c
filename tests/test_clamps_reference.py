"""Values as in another model: a checkpoint, another run at the same step, or the model itself unclamped."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drawn import Drawn
from patchclamp.errors import SiteError, TrainingError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Rows, Training, next_token, train
from patchclamp.training.clamps import Ablate, Match, Preserve, Schedule

TOKENS = torch.tensor([[5, 7, 5, 9, 7, 5, 7], [3, 3, 4, 8, 3, 4, 6]])
ROWS = Rows(TOKENS, torch.ones(2, 7))


def grouped(seed: int = 0, heads: int = 4) -> Model:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=heads,
                         num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.3)  # fmt: skip
    return Model.load(LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 0, 2, 4 and 6."""
    out = tmp_path_factory.mktemp("reference")
    return train(grouped(7), Drawn(), Training(6, batch=4, rate=0.02, checkpoints=(0, 2, 4, 6)), out).out


@pytest.mark.parametrize(
    "site", ["L1.h2", "L0.h1.pattern", "L1.h3.q", "L0.kv1.k", "L1.kv0.v", "L0.mlp", "L1.resid.post", "L0.h0.scores"]
)
def test_a_preserved_value_is_the_checkpoints_and_a_constant(site: str, run: Path):
    model, folder = grouped(), run / "checkpoints/step-0000004"
    at = Site.parse(site)
    mine, theirs = model.record(TOKENS, at)[at], Model.load(folder).record(TOKENS, at)[at]
    edits = Preserve(site, folder, Schedule(strength=0.25)).edits(model, 0, ROWS)
    found = model.record(TOKENS, at, edits)[at]
    seen = mine > -1e30
    torch.testing.assert_close(found[seen], (0.75 * mine + 0.25 * theirs)[seen], atol=2e-6, rtol=1e-5)
    assert torch.equal(found[~seen], mine[~seen])
    whole = model.record(TOKENS, at, Preserve(site, folder).edits(model, 0, ROWS))[at]
    assert torch.equal(whole[seen], theirs[seen])


def test_other_heads_are_left_and_nothing_is_learned_behind_a_preserved_value(run: Path):
    """With all queries and keys of a layer preserved, its projections of them have no gradient; values have."""
    model, folder = grouped(), run / "checkpoints/step-0000002"
    before = model.record(TOKENS, "L0.pattern")[Site("pattern", 0)]
    after = model.record(TOKENS, "L0.pattern", Preserve("L0.h1.pattern", folder).edits(model, 0, ROWS))[Site("pattern", 0)]
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]]) and not torch.equal(before[:, 1], after[:, 1])
    with model.editing(Preserve(("L1.q", "L1.k"), folder).edits(model, 0, ROWS), TOKENS):
        next_token(model.hf(input_ids=TOKENS, use_cache=False).logits, ROWS).backward()
    attention = model.hf.model.layers[1].self_attn
    assert not attention.q_proj.weight.grad.any() and not attention.k_proj.weight.grad.any()
    assert attention.v_proj.weight.grad.any()


def test_a_pattern_preserved_as_in_the_model_itself_is_as_without_the_ablation():
    """An earlier head ablated moves the later pattern; preserved, it is what it was."""
    model, at = grouped(), Site("pattern", 1)
    plain = model.record(TOKENS, at)[at]
    ablated = Ablate("L0.h*").edits(model, 0, ROWS)
    assert not torch.allclose(model.record(TOKENS, at, ablated)[at], plain, atol=1e-3)
    kept = Preserve("L1.h*.pattern").edits(model, 0, ROWS)
    assert torch.equal(model.record(TOKENS, at, {**ablated, **kept})[at], plain)


def test_matching_follows_the_other_run_step_by_step(run: Path):
    model, at = grouped(), Site("z", 1, 2)
    for step, kept in ((0, 0), (1, 0), (2, 2), (5, 4), (6, 6), (99, 6)):
        theirs = Model.load(run / f"checkpoints/step-{kept:07d}").record(TOKENS, at)[at]
        found = model.record(TOKENS, at, Match("L1.h2", run).edits(model, step, ROWS))[at]
        assert torch.equal(found, theirs)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_a_matched_pattern_has_a_temperature(temperature: float, run: Path):
    """p^(1/T), normalised, is softmax of scores over T."""
    model, at = grouped(), Site("pattern", 0, 1)
    other = Model.load(run / "checkpoints/step-0000002")
    scores = other.record(TOKENS, Site("scores", 0, 1))[Site("scores", 0, 1)]
    hard = torch.nn.functional.one_hot(scores.argmax(-1), 7).float()
    expected = torch.softmax(scores / temperature, -1) if temperature else hard
    found = model.record(TOKENS, at, Match("L0.h1.pattern", run, temperature=temperature).edits(model, 3, ROWS))[at]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_a_run_that_matches_itself_is_itself(run: Path, tmp_path: Path):
    """Every head held to the same run, whose checkpoints are kept at each step: the same first loss, and nothing learned behind."""
    numbers = Training(2, batch=4, rate=0.02, checkpoints=(0, 1, 2))
    plain = train(grouped(7), Drawn(), numbers, tmp_path / "plain")
    held = train(grouped(7), Drawn(), numbers, tmp_path / "held", clamps=[Match(("L0.h*", "L1.h*"), plain.out)])
    losses = [one.curve("loss")["value"].to_list() for one in (plain, held)]
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-6)
    ends = [one.hf.model.layers[0].self_attn.q_proj.weight for one in (held.model, grouped(7), plain.model)]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_a_reference_is_in_the_runs_identity(run: Path, tmp_path: Path):
    """By its weights: another path to the same checkpoint is the same clamp, another checkpoint is not."""
    shutil.copytree(run / "checkpoints/step-0000002", tmp_path / "step-0000002")
    one, two, three = (Preserve("L0.h1", folder) for folder in (
        run / "checkpoints/step-0000002", tmp_path / "step-0000002", run / "checkpoints/step-0000004"))  # fmt: skip
    assert repr(one) == repr(two) != repr(three)
    assert "0:" in repr(Match("L0.h1", run)) and repr(Match("L0.h1", run)) != repr(Match("L0.h1", run, Schedule(strength=0.5)))


def test_what_cannot_be_held_is_refused(run: Path, tmp_path: Path):
    model = grouped()
    with pytest.raises(TrainingError, match="no checkpoint"):
        Preserve("L0.h1", tmp_path)
    with pytest.raises(TrainingError, match="holds no checkpoints"):
        Match("L0.h1", tmp_path)
    with pytest.raises(TrainingError, match="temperature is for patterns"):
        Match("L0.h1", run, temperature=0.5)
    with pytest.raises(SiteError):
        Preserve("L5.h1", run / "checkpoints/step-0000002").edits(model, 0, ROWS)
    wide = grouped(heads=2)
    with pytest.raises(TrainingError, match="in the reference"):
        wide.record(TOKENS, "logits", Preserve("L0.h1.q", run / "checkpoints/step-0000002").edits(wide, 0, ROWS))
    late = train(grouped(7), Drawn(), Training(3, batch=4, checkpoints=(2,)), tmp_path / "late")
    shutil.rmtree(late.out / "checkpoints/step-0000000")
    with pytest.raises(TrainingError, match="no checkpoint at or before step 1"):
        Match("L0.h1", late.out).edits(model, 1, ROWS)
