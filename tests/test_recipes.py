"""Recipes: what their rows are, by the laws they claim; the registry; what is kept of a trained model, and when it is refused."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchclamp import zoo
from patchclamp.errors import ModelError, StoreError, TrainingError
from patchclamp.models.model import Model
from patchclamp.zoo import _cache
from patchclamp.zoo.recipes import OWN, classes, recipe, recipes
from patchclamp.zoo.recipes._attention import Attention
from patchclamp.zoo.recipes._recipe import Finding, Goal, attention_only
from patchclamp.zoo.recipes.backcopy import Backcopy
from patchclamp.zoo.recipes.classes import Contexts
from patchclamp.zoo.recipes.grokking import P, Sums
from patchclamp.zoo.recipes.induction import Repeats, certain

ROOM = Path(_cache.__file__).parent


# --- every recipe


def test_the_folder_is_the_registry() -> None:
    files = {path.stem for path in (ROOM / "recipes").glob("*.py") if not path.stem.startswith("_")}
    assert set(OWN) < files
    assert {one.name.partition("_")[0] for one in recipes().values()} == files - set(OWN)
    with pytest.raises(ModelError, match="choose from induction"):
        recipe("inductoin")


@pytest.mark.parametrize("name", recipes())
def test_rows_are_a_function_of_the_step(name: str) -> None:
    """The same step twice gives the same rows, another step or seed gives others; ids are in the vocabulary."""
    one = recipe(name)
    rows, again, other = one.data(0).rows(-1, 16), one.data(0).rows(-1, 16), one.data(0).rows(-2, 16)
    assert torch.equal(rows.tokens, again.tokens) and torch.equal(rows.weights, again.weights)
    assert not torch.equal(rows.tokens, other.tokens)
    assert not torch.equal(rows.tokens, one.data(1).rows(-1, 16).tokens)
    assert one.data(0).name != one.data(1).name
    words = one.build(0).config.vocab_size
    assert int(rows.tokens.min()) >= 0 and int(rows.tokens.max()) < words
    assert one.vocabulary is None or len(one.vocabulary) == len(set(one.vocabulary)) == words


@pytest.mark.parametrize("name", recipes())
def test_goals_are_of_numbers_that_are_measured(name: str) -> None:
    """On random weights every measure is finite, and no goal is reached: a goal that chance reaches says nothing."""
    one = recipe(name)
    numbers = one.measure(Model.load(one.build(0)), 0)
    assert all(math.isfinite(value) for value in numbers.values())
    assert not any(goal.reached(numbers[goal.measure]) for goal in one.goals)


def test_a_goal_is_not_reached_by_nan() -> None:
    assert Goal("x", least=1.0).reached(1.0) and not Goal("x", least=1.0).reached(0.99)
    assert Goal("x", most=1.0).reached(1.0) and not Goal("x", most=1.0).reached(1.01)
    assert not Goal("x", least=1.0).reached(math.nan) and not Goal("x", most=1.0).reached(math.nan)
    with pytest.raises(ModelError, match="give one of them"):
        Goal("x")


def test_attention_only_is_the_sum_of_its_heads() -> None:
    """MLPs write exactly nothing, and their weights do not learn; all others do."""
    hf = recipe("induction").build(0)
    model = Model.load(hf)
    rows = Repeats().rows(-1, 2)
    assert all(not value.any() for value in model.record(rows.tokens, "L*.mlp").values())
    assert {name.split(".")[3] for name, weight in hf.named_parameters() if not weight.requires_grad} == {"mlp"}
    with pytest.raises(ModelError, match="experts"):
        from transformers import MixtralConfig, MixtralForCausalLM

        attention_only(MixtralForCausalLM(MixtralConfig(
            vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=2, max_position_embeddings=16, pad_token_id=0,
        )).eval())  # fmt: skip


# --- their rows


def test_repeats_repeat() -> None:
    """By a loop of the test's own: what is certain follows from the last time; what is not has not been there before."""
    rows = Repeats().rows(3, 64)
    sure = certain(rows)
    starts = set()
    for row, asked, first in zip(rows.tokens.tolist(), sure.tolist(), rows.labels["first"].tolist(), strict=True):
        starts.add(first)
        for place in range(2, len(row)):
            last = max((i for i in range(1, place - 1) if row[i] == row[place - 1]), default=None)
            assert (last is not None) == asked[place]
            if last is not None:
                assert row[place] == row[last + 1]
        assert row[0] == 1 and len(set(row[:first])) == first
    assert len(starts) > 12  # so that positions do not tell where the repeat begins


def test_sums_are_sums_and_no_pair_is_on_both_sides() -> None:
    data = Sums()
    seen, unseen = data.pairs(True), data.pairs(False)
    both = torch.cat([seen, unseen]) @ torch.tensor([P, 1])
    assert both.sort().values.tolist() == list(range(P * P))
    assert len(seen) == round(data.share * P * P)
    rows = data.rows(0, len(seen))
    assert torch.equal(rows.tokens[:, 3], (rows.tokens[:, 0] + rows.tokens[:, 1]) % P)
    assert bool((rows.tokens[:, 2] == P).all()) and torch.equal(rows.tokens[:, :2], seen)
    assert torch.equal(rows.weights.sum(0), torch.tensor([0.0, 0.0, 0.0, float(len(seen))]))
    part = data.rows(0, 100).tokens[:, :2] @ torch.tensor([P, 1])
    assert len(part.unique()) == 100 and not torch.equal(part, data.rows(1, 100).tokens[:, :2] @ torch.tensor([P, 1]))
    with pytest.raises(TrainingError, match="at most so many"):
        data.rows(0, P * P)


def test_backcopy_follows_its_law() -> None:
    """Behind a trigger stands the word before it, always; behind words, counts are the law's: chi-squared over all cells.

    512 rows have some 10,000 pairs. Of the law's cells only those expected at least 5 times are counted; the statistic of n cells
    has mean about n and deviation sqrt(2 n): 5 deviations are allowed.
    """
    data = Backcopy()
    tokens = data.rows(0, 512).tokens
    trigger = data.is_trigger(tokens)
    assert torch.equal(tokens[:, 2:][trigger[:, 1:-1]], tokens[:, :-2][trigger[:, 1:-1]])
    assert not trigger[:, :2].any() and bool((tokens[:, 0] == 1).all())
    now, then = tokens[:, 1:-1][~trigger[:, 1:-1]] - 3, tokens[:, 2:][~trigger[:, 1:-1]] - 3
    plain = data.words - data.triggers
    counts = torch.zeros(plain, data.words, dtype=torch.float64)
    counts.index_put_((now, then), torch.ones(len(now), dtype=torch.float64), accumulate=True)
    expected = data.law * counts.sum(1, keepdim=True)
    enough = expected >= 5
    statistic, cells = float(((counts - expected) ** 2 / expected)[enough].sum()), int(enough.sum())
    assert cells > 300 and abs(statistic - cells) < 5 * math.sqrt(2 * cells)


def test_backcopy_best_loss_is_the_laws() -> None:
    """-log p token by token, in a loop; and its mean is the entropy of the law's rows, within 4 standard errors."""
    data = Backcopy()
    tokens = data.rows(0, 256).tokens
    best = data.best(tokens)
    trigger = data.is_trigger(tokens)
    for row in range(4):
        for place in range(tokens.shape[1] - 1):
            token, following = int(tokens[row, place]), int(tokens[row, place + 1])
            if place == 0:
                wanted = math.log(data.words - data.triggers)
            elif trigger[row, place]:
                wanted = 0.0
            else:
                wanted = -math.log(float(data.law[token - 3, following - 3]))
            assert float(best[row, place]) == pytest.approx(wanted, abs=1e-5)
    entropy = -(data.law * data.law.log()).sum(1)
    asked = ~trigger[:, 1:-1]
    gap = best[:, 1:][asked] - entropy[tokens[:, 1:-1][asked] - 3]
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))


def test_contexts_have_the_labels_of_their_classes() -> None:
    """Items read back from ids; a class has one label in a row, in training always the same, new classes others in other rows."""
    data = Contexts(zipf=1.0)
    first = 3 + data.labels
    known = {}
    for ask in ("trained", "icl", "weights"):
        rows = data.asking(ask, -1, 200)
        items, labels = (rows.tokens[:, 0::2] - first) // data.exemplars, rows.tokens[:, 1::2] - 3
        assert int(labels.min()) >= 0 and int(labels.max()) < data.labels
        there = (items[:, :-1] == items[:, -1:]).sum(1)
        assert set(there.tolist()) == ({0} if ask == "weights" else {data.burst})
        assert bool((items >= data.classes).all() if ask == "icl" else (items < data.classes).all())
        for row in range(len(items)):
            told = dict(zip(items[row].tolist(), labels[row].tolist(), strict=True))
            assert [told[item] for item in items[row].tolist()] == labels[row].tolist()
            if ask == "icl":
                assert len(set(told.values())) == len(told)
                for item, label in told.items():
                    known.setdefault(item, set()).add(label)
            else:
                assert all(label == item % data.labels for item, label in told.items())
    assert sum(len(labels) > 1 for labels in known.values()) > 50


def test_contexts_are_as_bursty_and_as_uneven_as_asked() -> None:
    """Classes of rows that are not bursty have frequencies k^-1: the ratio of the first to the tenth is 10, within 4 errors."""
    data = Contexts(classes=256, zipf=1.0, bursty=0.0, burst=1)
    classes = data.rows(0, 4000).labels["classes"].flatten()
    counts = Counter(classes.tolist())
    error = 4 * 10 * math.sqrt(1 / counts[0] + 1 / counts[9])
    assert counts[0] / counts[9] == pytest.approx(10, abs=error)
    half = Contexts(classes=256, bursty=0.5, burst=2).rows(0, 4000)
    there = (half.labels["classes"] == half.labels["target"][:, None]).sum(1)
    assert float((there == 2).float().mean()) == pytest.approx(0.5, abs=0.04)  # 5 standard errors of 4000 rows
    with pytest.raises(TrainingError, match="burst must divide pairs"):
        Contexts(burst=3)


def test_classes_are_told_apart_by_what_is_asked() -> None:
    """A model is right by chance before training, and its embedding is the data's and does not learn."""
    hf = classes.build(0)
    numbers = classes.measure(Model.load(hf), 0)
    assert all(numbers[name] <= 0.1 for name in ("accuracy", "icl", "weights"))
    weight = hf.get_input_embeddings().weight
    assert not weight.requires_grad and torch.equal(weight, Contexts(0).embedding())
    assert not any(layer.mlp.down_proj.weight.any() for layer in hf.model.layers)
    assert [bool(layer.mlp.down_proj.weight.any()) for layer in classes.build(0, neurons=8).model.layers] == [False, True]


def test_exemplars_of_a_class_are_near_each_other() -> None:
    """Cosine of two exemplars: 1 / (1 + noise^2) on average; of two classes: 0. Of 63 coordinates, so errors are about .13.

    The one that is left is the same for all tokens.
    """
    data = Contexts(exemplars=2)
    vectors = data.embedding()
    assert bool((vectors[:, -1] == 4).all())
    items = vectors[3 + data.labels :, :-1].unflatten(0, (-1, data.exemplars))
    unit = torch.nn.functional.normalize(items, dim=-1)
    within = (unit[:, 0] * unit[:, 1]).sum(-1)
    between = (unit[:-1, 0] * unit[1:, 0]).sum(-1)
    assert float(within.mean()) == pytest.approx(1 / 1.01, abs=0.002)
    assert abs(float(between.mean())) < 0.03 and float(between.std()) == pytest.approx(63**-0.5, rel=0.2)


# --- other attention


@pytest.mark.parametrize("kind", ["sigmoid", "relu", "clipped"])
def test_other_attention_is_that_function_of_the_scores(kind: str) -> None:
    """Against the formula, to 1e-6 (float32); nothing is seen ahead; gradients reach the scores."""
    model = Model.load(recipe("backcopy").build(0))
    rows = Backcopy().rows(-1, 2)
    edits = Attention(kind).edits(model, 0, rows)
    values = model.record(rows.tokens, ["L0.scores", "L0.pattern"], edits)
    scores, pattern = (next(value for site, value in values.items() if site.kind == which) for which in ("scores", "pattern"))
    for query in (0, 1, 7, 20):
        seen = scores[:, 0, query, : query + 1]
        if kind == "sigmoid":
            wanted = 1 / (1 + (query + 1) * torch.exp(-seen))
        elif kind == "relu":
            wanted = seen.clamp(min=0) / (query + 1)
        else:
            wanted = (1.03 * seen.softmax(-1) - 0.03).clamp(0, 1)
        torch.testing.assert_close(pattern[:, 0, query, : query + 1], wanted, atol=1e-6, rtol=0)
        assert not pattern[:, 0, query, query + 1 :].any()
    with model.editing(edits, rows.tokens):
        model.hf(input_ids=rows.tokens).logits.square().sum().backward()
    assert float(model.hf.model.layers[0].self_attn.q_proj.weight.grad.abs().max()) > 0


# --- what is kept


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe of three updates whose goal anything reaches, and a cache of its own."""
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path / "cache"))
    one = recipe("induction")
    training = replace(one.training, steps=3, warmup=0, batch=4, evaluate=3, checkpoints=(3,))
    quick = replace(
        one, name="quick", training=training, goals=(Goal("test_loss", most=100.0),), measure=lambda model, seed: {"test_loss": 1.5},
        found=lambda model, seed: (Finding("it is one", 1.0, Goal("one", least=1.0)),),
    )  # fmt: skip
    monkeypatch.setitem(recipes(), "quick", quick)
    return quick


def test_a_trained_model_is_kept_and_loads(short, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="zoo train quick"):
        zoo.load("quick")
    model = zoo.train("quick")
    loaded = Model.load("zoo/quick")
    for a, b in zip(model.hf.parameters(), loaded.hf.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loaded.tokenizer("w3")["input_ids"] == [1, 6]
    facts = json.loads((tmp_path / "cache/zoo/quick/recipe.json").read_text())
    assert facts["numbers"] == {"test_loss": 1.5} and facts["findings"][0]["holds"] and facts["seed"] == 0
    assert "it is one" in zoo.describe("quick")
    assert not (tmp_path / "cache/zoo/quick-seed-1").exists()
    zoo.train("quick", seed=1)
    other = Model.load("zoo/quick-seed-1")
    assert not torch.equal(other.hf.lm_head.weight, loaded.hf.lm_head.weight)


def test_what_was_kept_is_refused_when_it_is_not_what_it_says(short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.train("quick")
    monkeypatch.setitem(recipes(), "quick", replace(short, training=replace(short.training, rate=0.5)))
    with pytest.raises(ModelError, match="other numbers"):
        zoo.load("quick")
    monkeypatch.setitem(recipes(), "quick", short)
    zoo.load("quick")
    weights = tmp_path / "cache/zoo/quick/model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    with pytest.raises(StoreError, match="damaged"):
        zoo.load("quick")


def test_a_missed_goal_keeps_nothing(short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes(), "quick", replace(short, goals=(Goal("test_loss", most=0.1),)))
    with pytest.raises(TrainingError, match=r"test_loss <= 0\.1 \(it is 1\.5\)"):
        zoo.train("quick")
    assert not (tmp_path / "cache/zoo/quick").exists() and (tmp_path / "cache/zoo/runs/quick/metrics.parquet").is_file()


def test_a_name_cannot_leave_the_zoo() -> None:
    for name in ("zoo/../zoo/small", "zoo/", "zoo/small/../hist"):
        with pytest.raises(ModelError):
            Model.load(name)


def test_the_command_line_lists_trains_and_loads(short, cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    listed = json.loads(cli("zoo", "list", "--json")[1])
    rows = {row["model"]: row for row in listed["recipes"]}
    assert rows["zoo/quick"]["weights"] == "to be trained" and rows["zoo/induction"]["weights"] == "ships"
    assert {row["model"] for row in listed["trained"]} >= {"zoo/small", "zoo/hist"} and "switch" in listed["wired"]
    code, _, told = cli("zoo", "load", "quick")
    assert code == 2 and "patchclamp zoo train quick" in told
    assert "Not trained here yet" in cli("zoo", "about", "zoo/quick")[1]
    code, out, _ = cli("zoo", "train", "quick", "--out", "run", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["model"] == "zoo/quick" and facts["findings"][0]["holds"] is True
    assert (tmp_path / "run/checkpoints/step-0000003/config.json").is_file()
    code, out, _ = cli("zoo", "load", "quick")
    assert code == 0 and "test_loss 1.5" in out and "it is one" in out
    assert "it is one" in cli("zoo", "about", "quick")[1]
    assert json.loads(cli("zoo", "list", "--json")[1])["recipes"][0]["weights"] in ("ships", "trained here")
    assert cli("zoo", "train", "nothing")[0] == cli("zoo", "about", "nothing")[0] == 2


def test_docs_tell_every_recipe() -> None:
    """docs/zoo.md has a line for each recipe, with its row and its goal."""
    text = (Path(__file__).parent.parent / "docs/zoo.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for one in recipes().values():
        line = next((line for line in lines if line.startswith(f"| {one.name} | {one.row} |")), None)
        assert line is not None and all(str(goal) in line for goal in one.goals), one.name
