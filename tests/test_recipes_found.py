"""Trained recipes: those that ship do what they are said to do, and how; a recipe trained anew reaches its goal (long)."""

import json

import pytest
import torch

from patchclamp import zoo
from patchclamp.models.model import Model
from patchclamp.training.checkpoint import steps_of
from patchclamp.zoo import _cache
from patchclamp.zoo.recipes import recipe, recipes
from patchclamp.zoo.recipes.grokking import P, of_frequencies, without, written
from patchclamp.zoo.recipes.induction import certain, found

SHIPPED = [name for name, one in recipes().items() if one.ships]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_what_its_recipe_makes(name: str) -> None:
    """Its digest is the recipe's, its weights are those that were hashed, its goals are reached, and all that was found is again.

    Numbers to 1e-3: they were measured on the same rows by another process, perhaps with other kernels.
    """
    model, one = zoo.load(name), recipe(name)
    facts = _cache.facts_of(zoo.path(name))
    numbers = one.measure(model, 0)
    assert one.reached(numbers)
    assert numbers == pytest.approx(facts["numbers"], abs=1e-3, rel=1e-3)
    findings = one.found(model, 0)
    assert [finding.claim for finding in findings] == [row["claim"] for row in facts["findings"]]
    assert [finding.holds for finding in findings] == [row["holds"] for row in facts["findings"]]
    assert all(finding.holds for finding in findings)
    for finding, row in zip(findings, facts["findings"], strict=True):
        assert finding.number == pytest.approx(row["number"], abs=2e-3, rel=2e-3)
    assert f"# zoo/{name}" in zoo.describe(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_is_found_in_random_weights(name: str) -> None:
    """The model before training: at least half of what is claimed of the trained one does not hold, the first claim among it."""
    one = recipe(name)
    findings = one.found(Model.load(one.build(0)), 0)
    assert not findings[0].holds or name == "grokking"
    assert sum(finding.holds for finding in findings) <= len(findings) / 2


def test_all_shipped_weights_are_below_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in _cache.ROOM.rglob("*.safetensors")) < 12e6


def test_induction_is_not_found_where_its_previous_token_head_is_broken() -> None:
    """The shipped model with layer 0's values zeroed: patterns look as before, and the interventions say that it is lost."""
    model = zoo.load("induction")
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.v_proj.weight.zero_()
    claims = {finding.claim: finding for finding in found(model, 0)}
    back = next(finding for claim, finding in claims.items() if claim.startswith("layer 0 looks"))
    ahead = next(finding for claim, finding in claims.items() if claim.startswith("layer 1 looks"))
    assert back.holds and not ahead.holds


def test_induction_copies_the_token_behind_the_last_time() -> None:
    """Token by token on rows of the recipe, against what stands behind the last time in a loop of the test's own."""
    model, data = zoo.load("induction"), recipe("induction").data(0)
    rows = data.rows(-3, 16)
    said = model.run(rows.tokens).argmax(-1)
    right = total = 0
    for row, asked, guesses in zip(rows.tokens.tolist(), certain(rows).tolist(), said.tolist(), strict=True):
        for place in range(2, len(row)):
            if asked[place]:
                last = max(i for i in range(1, place - 1) if row[i] == row[place - 1])
                right, total = right + (guesses[place - 1] == row[last + 1]), total + 1
    assert right / total >= 0.98


def test_waves_of_all_frequencies_are_the_numbers() -> None:
    """Parts of single frequencies are orthogonal and add up to the vectors less their mean; to 1e-5 (float32)."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(P, 7, generator=draw)
    centred = numbers - numbers.mean(0)
    parts = [of_frequencies(centred, [key]) for key in range(1, P // 2 + 1)]
    torch.testing.assert_close(sum(parts), centred, atol=1e-5, rtol=0)
    assert abs(float((parts[0] * parts[4]).sum())) < 1e-4
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(P) / P)[:, None]
    torch.testing.assert_close(of_frequencies(wave, [3]), wave, atol=1e-5, rtol=0)
    assert float(of_frequencies(wave, [2, 4]).abs().max()) < 1e-5


def test_what_is_taken_from_an_embedding_is_as_if_its_weights_were_others() -> None:
    """By an edit at the embedding, and by changed weights: the same logits to 1e-4."""
    hf = recipe("grokking").build(0)
    model = Model.load(hf)
    gone = torch.randn(P, 48, generator=torch.Generator().manual_seed(0))
    edited = without(model, gone)
    with torch.no_grad():
        hf.get_input_embeddings().weight[:P] -= gone
        pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
        logits = hf(input_ids=written(pairs).tokens[:, :3]).logits[:, -1, :P]
    torch.testing.assert_close(edited.flatten(0, 1).float(), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", recipes())
def test_a_recipe_trained_anew_reaches_its_goal(name: str, tmp_path) -> None:
    """With its own seed, in a folder of its own; what it reaches is what its model is kept with. Minutes each."""
    place = _cache.make(recipe(name), 0, tmp_path / "run", tmp_path / "model")
    facts = json.loads((place / "recipe.json").read_text())
    assert recipe(name).reached(facts["numbers"])
    assert steps_of(tmp_path / "run")[-1] == recipe(name).training.steps
