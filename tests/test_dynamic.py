"""Controllers: what they see, that they run live as they are measured, and that they are learned by the exact slope."""

from functools import cache

import pytest
import torch

from cases import tiny
from patchclamp.errors import GateError
from patchclamp.gating.dynamic import Controller, DynamicSettings, Sight, look, without_wrong
from patchclamp.gating.dynamic.objective import TARGETS
from patchclamp.gating.dynamic.redraw import redrawn
from patchclamp.gating.dynamic.sight import generated, plain_stream
from patchclamp.metrics import METRICS
from patchclamp.models.inputs import prompts_of
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.parts.gated import gated
from patchclamp.parts.tied import tied
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from test_parts import examples

TIGHT = {"atol": 2e-5, "rtol": 2e-5}  # gates are float32, and so are all families but gpt2: sums in another order


@cache
def model_of(name: str = "gpt2") -> Model:
    hf = tiny(name, dtype=torch.float64 if name == "gpt2" else torch.float32)
    hf.generation_config.eos_token_id = None
    hf.config.eos_token_id = None
    return Model.load(hf)


def some(n: int = 6, answers: int = 1) -> Examples:
    """Prompts of two lengths, so that rows are padded."""
    return examples(n, (7, 5), 3, answers)


def random_controller(parts, sight: Sight, rank: int = 2, hard: bool = False, seed: int = 0) -> Controller:
    draws = torch.Generator().manual_seed(seed)
    labels = tuple(parts.labels[number] for number in parts.counted)
    size = sight.width if sight.reads else 0
    bias = torch.randn(2, len(labels), generator=draws).double()
    if sight.scope != "phase":
        bias = bias[:1].expand(2, -1)
    up, down = torch.randn(len(labels), rank, generator=draws), torch.randn(size, rank, generator=draws)
    return Controller(labels, sight, bias, up.double(), down.double(), hard)


def test_what_is_seen_is_the_stream_less_its_mean_over_its_deviation() -> None:
    model, given = model_of(), some()
    batch = given.batch()
    stream = model.record(batch, ["L1.resid.pre"])[Site("resid.pre", 1)]
    last = stream[torch.arange(len(batch)), batch.spans["end"][:, 0]]
    sight = look(model, given, "L1.resid.pre", "example")
    expected = (last - last.mean(0)) / last.std(0, correction=0)
    torch.testing.assert_close(sight.features(model, batch)[:, 0], expected, atol=1e-5, rtol=1e-5)  # the mean is kept in float32
    every = look(model, given, "L1.resid.pre", "token", places=True)
    seen = every.features(model, batch)
    tokens = stream[batch.mask]
    torch.testing.assert_close(
        seen[batch.mask][:, : model.width], (tokens - tokens.mean(0)) / tokens.std(0, correction=0), atol=1e-5, rtol=1e-5
    )
    assert seen.shape == (6, 7, model.width + 16)
    turns = seen[..., model.width :]  # the same position gives the same sines, wherever padding puts it
    torch.testing.assert_close(turns[0, 0], turns[1, 2])
    assert not torch.allclose(turns[0, 0], turns[0, 1])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_live_gates_are_measured_gates(name: str) -> None:
    """Reading the running pass where the site is before every gate; logits equal those of gates that were computed before."""
    model, given = model_of(name), some()
    batch = given.batch()
    parts = gated(model, ["L1.h*", "L1.mlp"])
    fallback = parts.fallback("mean:position" if name == "gpt2" else "zero", fit=given)
    controller = random_controller(parts, look(model, given, "L1.resid.pre", "token"))
    assert controller.live(parts)
    gates = controller.gates(parts, batch)
    assert gates.shape == (1, 6, 7, 5) and float(gates.std()) > 0.1
    expected = model.run(batch, parts.edits(gates, fallback, batch))
    torch.testing.assert_close(
        model.run(batch, controller.edits(parts, fallback, batch))[batch.mask], expected[batch.mask], **TIGHT
    )
    assert not torch.allclose(expected[batch.mask], model.run(batch)[batch.mask], atol=1e-3)


def test_whole_layers_are_driven_live_beside_their_heads() -> None:
    """Tied parts: a block's gate and that of one of its heads multiply, live as measured."""
    model, given = model_of(), some()
    batch, parts = given.batch(), tied(model, ["L1.block", "L1.h*"])
    controller = random_controller(parts, look(model, given, "L1.resid.pre", "token"))
    zero = parts.fallback("zero")
    expected = model.run(batch, parts.edits(controller.gates(parts, batch), zero, batch))
    found = model.run(batch, controller.edits(parts, zero, batch))
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], **TIGHT)
    assert controller.live(parts) and not torch.allclose(found[batch.mask], model.run(batch)[batch.mask], atol=1e-3)


@pytest.mark.parametrize("scope", ["example", "token"])
def test_a_site_behind_its_gates_is_read_in_the_plain_pass(scope: str) -> None:
    model, given = model_of(), some()
    batch, parts = given.batch(), nodes(model)
    fallback = parts.fallback("resample")
    controller = random_controller(parts, look(model, given, "L1.resid.post", scope), hard=True)
    assert not controller.live(parts)
    gates = controller.gates(parts, batch)
    assert gates.shape[2] == (1 if scope == "example" else 7) and set(gates.unique().tolist()) == {0.0, 1.0}
    expected = parts.measure(batch, gates, fallback, METRICS["logit_diff"])[0]
    logits = model.run(batch, controller.edits(parts, fallback, batch))
    found = METRICS["logit_diff"](logits[None, batch.target_row, batch.target_position], batch)[0]
    torch.testing.assert_close(found, expected, **TIGHT)
    with pytest.raises(GateError, match="plain pass of the prompts"):
        controller.edits(parts, parts.fallback("zero"))


@pytest.mark.parametrize("scope", ["phase", "example", "token"])
@pytest.mark.parametrize("cache_on", [True, False])
def test_generation_runs_controllers_live(scope: str, cache_on: bool) -> None:
    """Each new token is what one pass over all tokens so far, with gates by hand, gives."""
    model = model_of("llama")
    given = some(4)
    parts = gated(model, ["L1.h*", "L1.mlp"])
    site = None if scope == "phase" else "L1.resid.pre"
    controller = random_controller(parts, look(model, given, site, scope))
    prompts = prompts_of(given.batch())
    zero = parts.fallback("zero")
    edits = controller.edits(parts, zero, None if scope != "example" else prompts)
    said = model.generate(prompts, edits, max_new_tokens=4, cache=cache_on)
    for row, (prompt, new) in enumerate(zip(said.prompts, said.tokens, strict=True)):
        whole = torch.tensor([[*prompt, *new[:-1]]])
        count = whole.shape[1]
        if scope == "example":
            gates = controller.driven(model, prompts)[row : row + 1].expand(1, count, -1)
        else:
            seen = torch.zeros(1, count, 0)
            if scope == "token":
                positions = torch.arange(count)[None]
                seen = controller.sight.of(
                    plain_stream(model, model.batch(whole), Site("resid.pre", 1)), positions, positions >= 0
                )
            gates = controller.drive(seen, torch.arange(count)[None] >= len(prompt))
        logits = model.run(whole, parts.edits(gates[None].float(), zero, model.batch(whole)))[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == list(new)
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(said.log_probabilities[row]), picked, atol=1e-4, rtol=1e-4)


def test_new_tokens_have_no_corrupt_prompt_and_no_plain_pass() -> None:
    model, given = model_of(), some(4)
    parts, prompts = nodes(model), prompts_of(given.batch())
    late = random_controller(parts, look(model, given, "L1.resid.post", "token"))
    with pytest.raises(GateError, match="on new tokens that needs a plain"):
        model.generate(prompts, late.edits(parts, parts.fallback("zero"), prompts), max_new_tokens=2)
    with pytest.raises(GateError, match="'resample' needs corrupt prompts"):
        random_controller(parts, Sight("static")).edits(parts, parts.fallback("resample"), prompts)


def test_gates_per_token_want_one_row_per_example_and_phases_are_told_apart() -> None:
    model, given = model_of(), some(4, answers=3)
    batch = given.batch()
    assert len(batch.tokens) == 8  # wrong answers have rows of their own
    with pytest.raises(GateError, match="one row per example"):
        look(model, given, "L0.resid.post", "token")
    alone = without_wrong(given).batch()
    behind = generated(alone)
    assert behind.sum(-1).tolist() == [2, 2, 2, 2] and bool(behind[:, -2:].all())
    parts = gated(model, ["L1.h*"])
    gates = random_controller(parts, Sight("phase")).gates(parts, alone)
    assert torch.equal(gates[0, 0, 0], gates[0, 0, 6]) and not torch.equal(gates[0, 0, 6], gates[0, 0, 7])


@pytest.mark.parametrize("scope", ["static", "phase", "example", "token"])
def test_the_fitted_slope_is_that_of_the_objective(scope: str) -> None:
    """One step of plain descent by the fit's own slopes: the objective falls by rate x |slope|^2, by finite differences."""
    from patchclamp.gating.dynamic import fit as module

    model, given = model_of(), without_wrong(some(5, answers=2))
    parts = gated(model, ["L0.h*", "L1.h*", "L1.mlp"])
    fallback, batch = parts.fallback("zero"), given.batch()
    site = None if scope in ("static", "phase") else "L1.resid.pre"
    settings = DynamicSettings(scope=scope, site=site, prices=(0.05,), seeds=1, rank=2, relaxation="sigmoid")  # type: ignore[arg-type]
    sight = look(model, given, site, scope)
    rows = module._Rows.start([parts.labels[n] for n in parts.counted], sight, settings, model.device)
    with torch.no_grad():
        rows.up.normal_(generator=torch.Generator().manual_seed(1))
        rows.behind.normal_(generator=torch.Generator().manual_seed(2))
    redraw = redrawn((len(batch), len(parts.labels)), 4, torch.Generator().manual_seed(0))[2].double()
    learned = [rows.bias, rows.behind, rows.up, rows.down]
    seen = sight.features(model, batch)

    def objective() -> tuple[torch.Tensor, torch.Tensor]:
        gates, mask = rows.gates(seen, batch, settings, torch.Generator())
        every = module._every(parts, gates.detach()).double()
        value, slope = parts.gradient(batch, every + (1 - every) * redraw, fallback, TARGETS["model"])
        slope = slope if slope.dim() == 4 else slope[:, :, None]
        opened = (gates * mask).sum((1, 2, 3)) / mask.expand(1, *gates.shape[1:3], 1).sum()
        into = (slope * (1 - redraw))[..., list(parts.counted)]
        priced = (rows.price * opened).sum()
        return value.mean(1).sum() + priced.detach(), (into * gates).sum() / len(batch) + priced

    before, surrogate = objective()
    slopes = [
        torch.zeros_like(one) if g is None else g
        for one, g in zip(learned, torch.autograd.grad(surrogate, learned, allow_unused=True), strict=True)
    ]
    size = sum(float((g.double() ** 2).sum()) for g in slopes)
    assert size > 1e-6
    step, ends = 1e-2 / size**0.5, []
    for sign in (1, -1):
        with torch.no_grad():
            for one, g in zip(learned, slopes, strict=True):
                one.add_(sign * step * g)
        ends.append(float(objective()[0]))
        with torch.no_grad():
            for one, g in zip(learned, slopes, strict=True):
                one.sub_(sign * step * g)
    # gates are float32 (1e-7), the objective changes by 1e-3 and more; a central difference errs by the step's square
    assert (ends[0] - ends[1]) / 2 == pytest.approx(step * size, rel=2e-2)
    assert float(before) > 0
    if scope != "phase":
        assert not slopes[1].any()


def test_redraws_go_from_closed_towards_open_only() -> None:
    draws = redrawn((5, 7), 40, torch.Generator().manual_seed(0))
    assert len(draws) == 41 and not draws[0].any()
    assert bool((draws[-1] == 1).all()) and len(redrawn((5, 7), 0, torch.Generator())) == 1
    together = torch.cat([one.expand(1, 5, 1, 7) for one in draws[1:-1]])
    assert float(together.min()) == 0 and 0.9 < float(together.max()) <= 1
    assert any((one == one[:, :1]).all() for one in draws[1:-1]) and any(one.shape[1] == 5 for one in draws[1:])
    gates = torch.rand(5, 1, 7)
    moved = gates + (1 - gates) * together
    assert bool((moved >= gates).all()) and bool((moved <= 1).all())


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"prices": ()}, {"updates": 0}, {"prices": (-1.0,)}, {"temperature": 0.0}):
        with pytest.raises(GateError):
            DynamicSettings(**wrong)
    model, given = model_of(), some(3)
    with pytest.raises(GateError, match="none: try"):
        look(model, given, "L1.h0", "example")
    with pytest.raises(GateError, match="name a site"):
        look(model, given, None, "token")
    with pytest.raises(GateError, match="read nothing"):
        look(model, given, "embed", "phase")
