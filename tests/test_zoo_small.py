"""The trained model that ships: what it can do on word combinations that it was never trained on, and how it was made."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchclamp import zoo
from patchclamp.errors import ModelError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import gated
from patchclamp.tasks import load_task
from patchclamp.zoo.recipes import small
from patchclamp.zoo.recipes._texts import rows, unseen, unseen_examples

REQUIRED = ("ioi", "greater_than", "induction", "gendered_pronoun", "agreement", "capitals", "coloured_objects")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo.path("small"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(zoo.path("small")).eval()


@pytest.mark.parametrize("name", REQUIRED)
def test_solves_unseen_word_combinations(name: str, model, tokenizer) -> None:
    """Logit difference, left-padded rows, examples drawn with a seed that neither training nor its choices used."""
    examples = unseen_examples(name, tokenizer, n=150, seed=101)
    assert len(examples) >= 60
    assert all(unseen(example.pair.clean) for example in examples)
    batch = examples.batch()
    with torch.no_grad():
        out = model(input_ids=batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids)
    values = METRICS["logit_diff"](out.logits[batch.target_row, batch.target_position][None], batch)
    assert (values > 0).float().mean() >= 0.95


@pytest.mark.parametrize("name", REQUIRED)
def test_every_pair_of_a_task_fits_the_tokenizer(name: str, tokenizer) -> None:
    examples = load_task(name).examples(tokenizer, 200)
    assert not examples.dropped.keys() - {"drawn before"}


def test_unseen_is_a_fifth_and_ignores_the_order_of_words(tokenizer) -> None:
    pairs = [example.pair for example in load_task("ioi").examples(tokenizer, 400, seed=5)]
    share = sum(unseen(pair.clean) for pair in pairs) / len(pairs)
    assert 0.13 < share < 0.27
    assert all(unseen(pair.clean) == unseen(pair.corrupt) for pair in pairs)


@pytest.mark.parametrize("name", [*REQUIRED, "addition", "name_recall"])
def test_training_text_holds_no_unseen_prompt(name: str, tokenizer) -> None:
    """Each row begins with a prompt, which is cut off at the answer (the weighted tokens) and hashed anew."""
    for row in rows({name: 150}, tokenizer, "test"):
        if name == "induction":
            line = row.tokens[1 : row.tokens.index(row.tokens[1], 2)]
            assert row.tokens[1:-1] == line * 2
            continue
        at = next(i for i, weight in enumerate(row.weights) if weight == 1.0)
        assert not unseen(tokenizer.decode(list(row.tokens[1:at])))


def test_tokenizer_round_trips_and_keeps_words_and_digit_pairs_whole(tokenizer) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("The war lasted from the year 1732 to the year 17")["input_ids"])
    assert tokens == ["<bos>", "The", " war", " lasted", " from", " the", " year", " 17", "32", " to", " the", " year", " 17"]
    for name in REQUIRED:
        if name != "induction":
            text = load_task(name).examples(tokenizer, 1, seed=random.Random(name).randrange(100))[0].pair.clean
            coded = tokenizer(text, return_offsets_mapping=True)
            assert tokenizer.decode(coded["input_ids"][1:]) == text
            assert "".join(text[start:end] for start, end in coded["offset_mapping"]) == text


def test_what_ships_is_small_and_complete() -> None:
    folder = zoo.path("small")
    shipped = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= shipped.keys()
    assert sum(shipped.values()) < 10 * 2**20
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_the_zoo_names_and_describes() -> None:
    assert "small" in zoo.names()
    assert all(name in zoo.describe("small") for name in REQUIRED)
    with pytest.raises(ModelError, match="no trained model 'large'"):
        zoo.path("large")


def test_the_course_begins_when_the_tasks_are_known_and_never_goes_back() -> None:
    recipe, low = small.Recipe(), dict.fromkeys((*small.TASKS, *small.COURSE), 0.0)
    known = low | dict.fromkeys(small.TASKS, 1.0) | {"addition": 0.0}
    first, second = small.COURSE[:2]
    assert small.course_of(recipe, small.State(accuracy=low)) == -1
    assert small.course_of(recipe, small.State(accuracy=known)) == 0
    assert small.course_of(recipe, small.State(accuracy=known | {second: 1.0})) == 0  # in order
    assert small.course_of(recipe, small.State(accuracy=known | {first: 1.0, second: 1.0})) == 2
    assert small.course_of(recipe, small.State(course=2, accuracy=low)) == 2
    assert small.course_of(recipe, small.State(accuracy=known | dict.fromkeys(small.COURSE, 1.0))) == len(small.COURSE)


def test_rows_are_shared_by_what_is_not_known() -> None:
    before = small.shares({"ioi": 1.0, "capitals": 0.0}, -1, 6400)
    assert not before.keys() & set(small.COURSE) and before["capitals"] == pytest.approx(11 * before["ioi"], abs=11)
    for course in range(len(small.COURSE) + 1):
        given = small.shares({}, course, 6400)
        assert sum(given.values()) == pytest.approx(6400, abs=20)
        if course < len(small.COURSE):
            assert given[small.COURSE[course]] == 2560


@pytest.mark.parametrize("name", small.LESSONS)
def test_lessons_ask_what_can_be_known(name: str, tokenizer) -> None:
    """What is asked stands right before its object, which is named again right before the answer or one word earlier."""
    for row in rows({name: 20}, tokenizer, "test"):
        tokens, stop = row.tokens, row.tokens.index(tokenizer.convert_tokens_to_ids("."))
        asked = [i for i in range(len(tokens)) if row.weights[i] >= 0.5]
        assert len(asked) >= 2 and min(asked) > stop
        for i in asked:
            thing = tokens[i - 2] if "linked" in name else tokens[i - 1]
            assert tokens[tokens.index(thing) - 1] == tokens[i]


def test_an_interrupted_training_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates, stopped and taken up again, against two updates at one go."""
    monkeypatch.setattr(small, "TASKS", ("induction", "agreement"))
    monkeypatch.setattr(small, "rows", lambda shares, tok, seed: rows({n: min(k, 4) for n, k in shares.items()}, tok, seed))
    monkeypatch.setattr(small, "unseen_examples", lambda name, tokenizer: unseen_examples(name, tokenizer, n=20))
    monkeypatch.setattr(small, "shares", lambda accuracy, course, count: {"induction": count // 2, "agreement": count // 2})
    recipe = small.Recipe(layers=1, heads=2, width=16, mlp=16, batch=4, every=1, most=2, last=1)
    small.train(recipe, tmp_path / "whole")
    keep = small._keep

    def killed(*args) -> None:
        keep(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(small, "_keep", killed)
        small.train(recipe, tmp_path / "parts")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    small.train(recipe, tmp_path / "parts")
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_ioi_is_told_by_what_stands_at_the_second_subject() -> None:
    """The claims of docs/ioi.md: the last layer carries values from there, wherever they come from, and speaks against them."""
    model = Model.load("zoo/small")
    some = load_task("ioi").split(model.tokenizer, 64, seed=0)[2]
    batch = some.batch()
    assert batch.wrong is not None
    means = {}
    for site, at in (("L3.h*.q", "end"), ("L3.kv*.k", "S2"), ("L3.kv*.v", "S2")):
        part = gated(model, [site], positions=(at,))
        own, other = part.measure(batch, torch.cat([part.open(), part.closed()]), part.fallback("resample")).mean(1)
        means[site] = float(other / own)
    assert abs(means["L3.h*.q"] - 1) < 0.05 and abs(means["L3.kv*.k"] - 1) < 0.05 and means["L3.kv*.v"] < -0.5
    known, third = sorted({one.answers[0][0] for one in some}), batch.tokens.clone()
    pairs = torch.cat([batch.answers, batch.wrong], -1).tolist()
    put = torch.tensor([next(name for name in known if name not in pair) for pair in pairs])
    third[batch.columns("S2")] = put
    values = model.run(third)[torch.arange(len(third)), batch.target_position]
    own = model.run(batch)[batch.target_row, batch.target_position]
    assert float((values.gather(-1, put[:, None]) - own.gather(-1, put[:, None])).mean()) < -5  # said once, and spoken against
