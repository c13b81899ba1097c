"""zoo/needle: rows by their law, in loops of the test's own; retrieval found in a lookup wired by hand, and not in a broken one."""

import math

import pytest
import torch

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.zoo.recipes import needle
from patchclamp.zoo.recipes._look import judged
from patchclamp.zoo.recipes.needle import KEY, VALUE, VOCABULARY, WORD, Needles
from test_recipes_lookup import wired

# --- rows


def read(tokens: list[int]) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, str, int]], list[list[str]]]:
    """Needles (key, value, place of the key), questions (word, key, value, place of the key), and stretches of words between them."""
    words = [VOCABULARY[token] for token in tokens]
    assert words[0] == "<bos>"
    needles, questions, stretches, place = [], [], [[]], 1
    while place < len(words):
        if words[place] in ("find", "know"):
            questions.append((*words[place : place + 3], place + 1))
            place += 3
        elif words[place].startswith("k"):
            assert not questions
            needles.append((words[place], words[place + 1], place))
            stretches.append([])
            place += 2
        else:
            assert words[place].startswith("w") and not questions
            stretches[-1].append(words[place])
            place += 1
    return needles, questions, stretches


@pytest.mark.parametrize("length", [96, 192])
@pytest.mark.parametrize("again", [True, False])
def test_answers_stand_in_the_row_or_in_the_table(length: int, again: bool) -> None:
    data = Needles(0, length, (), again)
    table: dict[str, str] = {}
    asked, places = 0, set()
    for step in (0, -1):
        rows = data.rows(step, 64)
        for row, tokens in enumerate(rows.tokens.tolist()):
            needles, questions, stretches = read(tokens)
            labels = {name: values[row].tolist() for name, values in rows.labels.items()}
            values = {key: value for key, value, _ in needles}
            assert len(values) == len(needles) == 6 and len(questions) == 8
            assert labels["needle"] == [place for *_, place in needles]
            places |= set(labels["needle"])
            found = [(key, value, place) for word, key, value, place in questions if word == "find"]
            known = [(key, value, place) for word, key, value, place in questions if word == "know"]
            assert len(found) == 6 and [place for *_, place in found] == labels["find"]
            assert len(known) == 2 and [place for *_, place in known] == labels["know"]
            assert [key for key, *_ in found] == [needles[number][0] for number in labels["target"]]
            assert all(values[key] == value for key, value, _ in found)
            assert all(table.setdefault(key, value) == value for key, value, _ in known)
            asked += len({key for key, *_ in found}) < 6
            answers = {place + 1 for *_, place in questions}
            assert {i for i, weight in enumerate(rows.weights[row].tolist()) if weight == 1.0} == answers
            inner = sum(token >= WORD for token in tokens[3:])
            assert sum(map(len, stretches)) == length - 1 - 12 - 24
            assert int((rows.weights[row] == rows.weights.new_tensor(0.2)).sum()) == inner
            assert int((rows.weights[row] == 0).sum()) == length - inner - 8
    assert len(places) > (length - 25) * 0.8 and len(table) == 32
    assert asked > 110 if again else asked == 0  # of 128; six of six drawn with replacement are different in .015 of cases


def test_a_needle_says_nothing_of_the_table_or_of_other_needles() -> None:
    """Values are drawn evenly and apart: of needles, those that the table has are 1 in 32, and those that equal the next one's, too."""
    data = Needles()
    rows = data.rows(0, 2000)
    place = rows.labels["needle"]
    keys, values = rows.tokens.gather(1, place) - KEY, rows.tokens.gather(1, place + 1)
    error = 5 * math.sqrt(1 / 32 / keys.numel())
    assert float((data.known[keys] == values).float().mean()) == pytest.approx(1 / 32, abs=error)
    assert float((values[:, 1:] == values[:, :-1]).float().mean()) == pytest.approx(1 / 32, abs=error * 1.2)


def test_words_follow_their_law() -> None:
    """Chi-squared over all cells that are expected 5 times and more: of n cells mean about n, deviation sqrt(2 n), 5 allowed."""
    data = Needles()
    torch.testing.assert_close(data.law.sum(1), torch.ones(96))
    counts = torch.zeros(96, 32, dtype=torch.float64)
    for tokens in data.rows(0, 600).tokens.tolist():
        for before, after in zip(tokens[1:], tokens[3:], strict=False):
            if after >= WORD:
                counts[before - KEY, after - WORD] += 1
    expected = data.law.double() * counts.sum(1, keepdim=True)
    enough = expected >= 5
    statistic, cells = float(((counts - expected) ** 2 / expected)[enough].sum()), int(enough.sum())
    assert cells > 200 and abs(statistic - cells) < 5 * math.sqrt(2 * cells)


def test_rows_too_short_are_refused() -> None:
    assert Needles(0, 43, ()).rows(0, 2).tokens.shape == (2, 43)
    for wrong in ((42, ()), (96, (42, 80))):
        with pytest.raises(TrainingError, match="42 tokens have no room for 6 needles: give at least 43"):
            Needles(0, *wrong)


def test_training_rows_have_three_lengths_in_turn() -> None:
    data = Needles()
    assert [data.rows(step, 2).tokens.shape[1] for step in range(6)] == [64, 80, 96] * 2
    assert [data.rows(step, 2).tokens.shape[1] for step in (-1, -2, -3)] == [96] * 3


def test_excess_is_above_the_law() -> None:
    """Logits that are the law's have none; those of an even guess have log 32 less the law's own loss."""
    data = Needles()
    rows = data.rows(-1, 32)
    logits = torch.full((*rows.tokens.shape, len(VOCABULARY)), -30.0)
    logits[:, 1:, WORD:] = data.law.log()[(rows.tokens[:, :-1] - KEY).clamp(min=0)]
    assert needle.excess(logits, rows, data) == pytest.approx(0, abs=1e-5)
    even = torch.full_like(logits, -30.0)
    even[..., WORD:] = 0.0
    losses = [
        -math.log(float(data.law[before - KEY, after - WORD]))
        for tokens in rows.tokens.tolist() for before, after in zip(tokens[1:], tokens[3:], strict=False) if after >= WORD
    ]  # fmt: skip
    assert needle.excess(even, rows, data) == pytest.approx(math.log(32) - sum(losses) / len(losses), abs=1e-4)


# --- retrieval


def test_lookup_says_where_answers_are() -> None:
    """Against a search through each row; exchanged, the neighbour's value is what is said."""
    rows = Needles(0, again=False).rows(-2, 16)
    place = needle.lookup(rows)
    for row, tokens in enumerate(rows.tokens.tolist()):
        needles, questions, _ = read(tokens)
        order = [key for key, *_ in needles]
        at = {key: where + 1 for key, _, where in needles}
        assert place.before[row].nonzero().tolist() == [[where + 1, where] for *_, where in needles]
        asks = [(key, where) for word, key, _, where in questions if word == "find"]
        assert place.after[row].nonzero().tolist() == [[where, at[key]] for key, where in asks]
        assert place.asked[row].nonzero()[:, 0].tolist() == [where + 1 for _, where in asks]
        other = list(tokens)
        for key, where in asks:
            partner = order[order.index(key) + (1 if order.index(key) % 2 == 0 else -1)]
            assert int(place.exchange[row, at[key]]) == at[partner] and int(place.exchange[row, at[partner]]) == at[key]
            other[where + 1] = tokens[at[partner]]
        assert place.other[row].tolist() == other
    assert place.chance == pytest.approx(1 / 6)


def test_retrieval_wired_by_hand_is_found_and_without_its_keys_is_not() -> None:
    """A lookup by construction: layer 1's head says nearly all needles while it looks at them (but where `know` asked for the same key
    before, and two places fit), and without it they are lost. Without layer 0's values nothing is retrieved."""
    rows = Needles(0, again=False).rows(-2, 24)
    model = wired(len(VOCABULARY), range(VALUE, WORD))
    scores = needle.retrieval(model, rows)
    assert scores[Site("z", 0, 0)] == 0.0 and scores[Site("z", 1, 0)] > 0.9
    assert needle.heads(model, rows) == {Site("z", 1, 0)}
    whole, without, first = needle.closings(model, rows, [set(), {Site("z", 1, 0)}, {Site("z", 0, 0)}])
    assert whole["find"] == judged(model.run(rows.tokens), rows.tokens, needle.behind(rows, "find"))["accuracy"] > 0.9
    assert without["find"] < 0.2 and first["find"] < 0.4
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.v_proj.weight.zero_()
    assert max(needle.retrieval(model, rows).values()) < needle.COPIES and not needle.heads(model, rows)


@pytest.mark.long
def test_little_is_found_in_random_weights() -> None:
    """No head retrieves, all heads are said to be too many, and what is lost without them was not there."""
    findings = needle.found(Model.load(needle.build(0)), 0)
    assert not findings[0].holds and findings[0].number == 16
    assert not any(
        one.holds for one in findings if "they are not" in one.claim or "by heart" in one.claim or "most are right" in one.claim
    )


def test_other_sets_are_of_other_heads() -> None:
    heads = {Site("z", 0, head) for head in range(8)}
    pairs = needle.others(heads, 2)
    assert len(pairs) == needle.SETS and len({tuple(sorted(some)) for some in pairs}) == needle.SETS
    assert all(len(some) == 2 and some < heads for some in pairs)
    assert needle.others(heads, 8) == needle.others(heads, 9) == [heads] and len(needle.others(heads, 1)) == 8
