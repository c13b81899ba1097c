"""zoo/facts: rows by the law they claim, in loops of the tests' own; other people's values put in, and keys out of sight."""

import math

import pytest
import torch

from patchclamp.edits import Put
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.zoo.recipes import facts
from patchclamp.zoo.recipes._blind import Blind
from patchclamp.zoo.recipes.backcopy import At
from patchclamp.zoo.recipes.facts import LAYERS, PHRASES, VOCABULARY, Exchange, Facts


def read(tokens: list[int]) -> tuple[str, str, str, list[str]]:
    """First name, last name, phrase (none on a card) and objects, from the words of a row."""
    words = [VOCABULARY[token] for token in tokens if VOCABULARY[token] != "."]
    name = next(place for place, word in enumerate(words) if word.startswith("First"))
    assert words[:name] in (["<bos>"], ["<bos>", "they", "say"])
    objects = [word for word in words if word.rstrip("0123456789") in PHRASES and word not in PHRASES]
    assert words[-len(objects) :] == objects
    return words[name], words[name + 1], " ".join(words[name + 2 : -len(objects)]), objects


def test_a_fact_is_told_alike_on_cards_and_in_all_phrases() -> None:
    """Each person has one object a relation, in every row of every step; third phrases are never told of those held back."""
    data = Facts()
    known: dict[tuple[str, str, str], str] = {}
    relations = {phrase: (relation, number) for relation, phrases in PHRASES.items() for number, phrase in enumerate(phrases)}
    told = {True: set[tuple[str, str]](), False: set[tuple[str, str]]()}
    cards, orders = 0, set[tuple[str, ...]]()
    for step in (0, 1, -1, -2):
        rows = data.rows(step, 700)
        assert len(rows.tokens) == 700
        for tokens, weights, end in zip(rows.tokens.tolist(), rows.weights.tolist(), rows.labels["end"].tolist(), strict=True):
            first, last, phrase, things = read(tokens)
            for thing in things:
                assert known.setdefault((first, last, thing.rstrip("0123456789")), thing) == thing
            assert weights == [float(end < place <= end + len(things)) for place in range(len(weights))]
            assert VOCABULARY[tokens[end + 1]] == things[0]
            assert VOCABULARY[tokens[end]] == (phrase.split()[-1] if phrase else last)
            if not phrase:
                cards += 1
                orders.add(tuple(thing.rstrip("0123456789") for thing in things))
                assert step >= 0 and sorted(orders.copy().pop()) == sorted(PHRASES)
                continue
            relation, number = relations[phrase]
            assert len(things) == 1 and things[0].startswith(relation) and (step >= 0 or number == 2)
            if number == 2:
                told[step >= 0].add((first, last))
    assert not told[True] & told[False]  # whoever is asked about in a third phrase was never told of in one
    assert len(told[False]) == 48 and len(told[True]) > 60 and len(orders) == 6
    # half of the rows of steps from 0 on, but for the sentences left out (a ninth of them): 9/17 of 1400, within 4 errors
    assert cards / 1400 == pytest.approx(9 / 17, abs=4 * 0.5 / math.sqrt(1400))


def test_a_name_alone_tells_nothing() -> None:
    """Objects are drawn evenly: counts of 36 facts a first name over 12 objects, chi-squared with 11 degrees: 5 deviations allowed."""
    objects = Facts().objects
    for axis in (0, 1):
        for name in range(12):
            for relation in range(3):
                counts = objects.select(axis, name)[:, relation].bincount(minlength=12)
                assert int(counts.max()) <= 6  # of 12; more in one of 72 such counts has a probability of about 1e-3
    counts = objects.flatten().bincount(minlength=12).double()
    statistic = float(((counts - 36) ** 2 / 36).sum())
    assert abs(statistic - 11) < 5 * math.sqrt(22)
    assert not torch.equal(objects, Facts(1).objects)


def pairs_of(model: Model) -> Exchange:
    """Rows of random people: which are answered rightly does not matter here."""
    data = Facts()
    clean = data.rows(-1, 24)
    told = torch.stack([clean.labels[name] for name in ("first", "last", "relation", "phrase", "lead", "card")], 1)
    person = (told[:, :2] + 1) % 12
    return Exchange(model, clean, data.written(torch.cat([person, told[:, 2:]], 1)))


def test_places_are_the_words() -> None:
    model = Model.load(facts.build(0))
    pairs = pairs_of(model)
    places = pairs.places()
    for rows in (pairs.clean, pairs.other):
        for row, tokens in enumerate(rows.tokens.tolist()):
            first, last, phrase, _ = read(tokens)
            assert phrase
            for name, wanted in (
                ("first", [first]),
                ("last", [last]),
                ("phrase", phrase.split()[:-1]),
                ("end", phrase.split()[-1:]),
            ):
                assert [
                    VOCABULARY[token] for token, there in zip(tokens, places[name][row].tolist(), strict=True) if there
                ] == wanted


def test_all_of_another_person_put_in_is_that_person() -> None:
    """All positions behind the last layer: the answers are those of the first person's own run; nowhere: those of the second's."""
    model = Model.load(facts.build(0))
    pairs = pairs_of(model)
    end = pairs.clean.labels["end"]
    rows = torch.arange(len(end))
    every = torch.ones(pairs.clean.tokens.shape, dtype=torch.bool)
    own, other = (model.run(one.tokens).argmax(-1)[rows, end] for one in (pairs.clean, pairs.other))
    wanted = pairs.clean.tokens[rows, end + 1]
    assert pairs.recovered("resid.post", [LAYERS - 1], every) == pytest.approx(float((own == wanted).float().mean()))
    assert pairs.recovered("resid.post", [LAYERS - 1], ~every) == pytest.approx(float((other == wanted).float().mean()))
    assert not torch.equal(own, other)
    moved = {site: At(Put(value), every) for site, value in model.record(pairs.clean.tokens, "L0.resid.post").items()}
    assert torch.equal(pairs.answers(moved), own)


def test_what_is_out_of_sight_has_no_weight() -> None:
    model = Model.load(facts.build(0))
    pairs = pairs_of(model)
    blind = pairs.places()["end"][:, :, None] & pairs.places()["last"][:, None, :]
    pattern = model.record(pairs.other.tokens, "L2.pattern", {Site("scores", 2): Blind(blind)})[Site("pattern", 2)]
    plain = model.record(pairs.other.tokens, "L2.pattern")[Site("pattern", 2)]
    hidden = blind[:, None].expand_as(pattern)
    assert float(pattern[hidden].abs().max()) == 0.0 and float(plain[hidden].min()) > 0
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
    queries = ~pairs.places()["end"][:, None].expand(pattern.shape[:3])
    assert torch.equal(pattern[queries], plain[queries])
