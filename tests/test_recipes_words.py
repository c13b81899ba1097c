"""Recipes on rows of whole words: in-context functions, two languages, the tagged corpus. Their laws, by loops of the tests' own."""

import math
from collections import Counter, defaultdict

import pytest
import torch

from patchclamp import zoo
from patchclamp.circuit import Circuit
from patchclamp.errors import TaskError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.tasks import load_task
from patchclamp.zoo.recipes import _affects, _tags, _world, functions, languages, recipe, tagged
from patchclamp.zoo.recipes._llama import Exchange, carriers, effects, put_from_there, taken
from patchclamp.zoo.recipes._tags import AFFECTS, Tagged
from patchclamp.zoo.recipes._world import Languages
from patchclamp.zoo.recipes.functions import Functions


def words_of(vocabulary: tuple[str, ...], row: list[int]) -> list[str]:
    """A row as words, without padding."""
    return [vocabulary[token] for token in row if token]


# --- functions


def test_rows_of_functions_are_of_one_function_each() -> None:
    """Read back from the words: `capital-w3` is what capital makes of w3; a told row names its function; shares are as asked."""
    rows = Functions().rows(5, 400)
    told = Counter[bool]()
    for row, weights, kind in zip(rows.tokens.tolist(), rows.weights.tolist(), rows.labels["kind"].tolist(), strict=True):
        words = words_of(functions.VOCABULARY, row)
        assert words[0] == "<bos>" and [i for i, weight in enumerate(weights) if weight] == list(
            range(3, 4) if "-" in words[1] else range(2, 11, 2)
        )
        name = functions.KINDS[kind]
        told[words[1].startswith("do-")] += 1
        if words[1].startswith("do-"):
            assert words[1] == f"do-{name}" and words[3:] == [f"{name}-{words[2]}"]
        else:
            assert len(words) == 11 and words[2::2] == [f"{name}-{word}" for word in words[1::2]]
            assert len(set(words[1::2])) == 5
    assert told[True] / 400 == pytest.approx(0.3, abs=0.1)  # 4 standard errors


@pytest.mark.parametrize("form", functions.FORMS)
def test_exchanged_functions_differ_in_nothing_else(form: str) -> None:
    pairs = functions.exchange(form, 0, -2, 64)
    for here, there, said, other in zip(
        *(one.tolist() for one in (pairs.here, pairs.there, pairs.said, pairs.other)), strict=True
    ):
        a, b = words_of(functions.VOCABULARY, here), words_of(functions.VOCABULARY, there)
        name, new = (functions.VOCABULARY[answer].partition("-") for answer in (said, other))
        assert name[0] != new[0] and name[2] == new[2] == a[-1] == b[-1]
        assert [word.replace(name[0], new[0]) for word in a] == b
    with pytest.raises(TaskError, match="choose from shown, told"):
        functions.task("sung")
    tokenizer = zoo.load("functions").tokenizer
    pair = load_task("patchclamp.zoo.recipes.functions", form=form).examples(tokenizer, 8)[0]
    assert len(pair.clean) == len(pair.corrupt) == (10 if form == "shown" else 3)


# --- languages


@pytest.mark.parametrize("mixed", [0.0, 0.3])
def test_sentences_follow_the_world(mixed: float) -> None:
    """Words read back: one language a sentence (or any, where they are mixed), translations word by word, usual objects nine times
    in ten and by chance more, and never a pair that the minor language does not say."""
    data, world = Languages(mixed=mixed), _world.world()
    rows = data.rows(0, 2000)
    usual, shares = Counter[bool](), Counter[str]()
    for row, kind in zip(rows.tokens.tolist(), rows.labels["kind"].tolist(), strict=True):
        words = words_of(_world.VOCABULARY, row)
        assert len(words) == 8 and words[0] == "<bos>" and words[4] == ("=" if kind == 1 else ".")
        sentences = [words[1:4], words[5:8]]
        tongues = [{word.partition("-")[0] for word in sentence} for sentence in sentences]
        bare = [[word.partition("-")[2] for word in sentence] for sentence in sentences]
        assert [[word[0] for word in sentence] for sentence in bare] == [["s", "v", "o"]] * 2
        numbers = [[int(word[1:]) for word in sentence] for sentence in bare]
        assert kind == 2 or all(len(tongue) == 1 for tongue in tongues)
        if kind == 1:
            assert bare[0] == bare[1] and tongues[0] != tongues[1]
        assert kind or tongues[0] == tongues[1]
        for tongue, (s, v, o) in zip(tongues, numbers, strict=True):
            assert ("minor" not in tongue and kind == 0) or not world.unsaid[s, v]
            usual[o == int(world.object[s, v])] += 1
        shares[f"kind {kind}"] += 1
        shares["minor" if kind < 2 and "minor" in tongues[0] else "other"] += 1
    assert usual[True] / usual.total() == pytest.approx(0.9 + 0.1 / 16, abs=0.025)
    assert shares["minor"] / 2000 == pytest.approx(0.2 * (1 - mixed), abs=0.036)
    assert shares["kind 1"] / 2000 == pytest.approx(0.2, abs=0.036) and shares["kind 2"] / 2000 == pytest.approx(mixed, abs=0.041)
    assert int(world.unsaid.sum()) == 16 and bool((world.unsaid.sum(0) == 2).all())


def test_the_smallest_loss_of_languages_is_the_laws() -> None:
    """-log p by a loop over words: for some rows, the probability of every way to say their beginning, divided by that of one
    token less."""
    data, world = Languages(mixed=0.3), _world.world()
    rows = data.rows(-1, 60)
    found = data.best(rows)
    verbs = [world.verb_law(minor) for minor in (False, True)]

    def of_words(words: list[str], tongues: list[str] | None, law: int) -> float:
        """A sentence's beginning in these languages (None: each word in either), by this verb law."""
        p, numbers = 1.0, [int(word.partition("-")[2][1:]) for word in words]
        for place, word in enumerate(words):
            p *= 0.5 if tongues is None else float(word.startswith(tongues[place]))
            if place == 0:
                p /= 8
            elif place == 1:
                p *= float(verbs[law][numbers[0], numbers[1]])
            else:
                p *= 0.9 * (numbers[2] == int(world.object[numbers[0], numbers[1]])) + 0.1 / 16
        return p

    def probability(words: list[str]) -> float:
        first, sign, second = words[:3], words[3:4], words[4:]
        total = 0.0
        for number, (tongue, other, share) in enumerate((("major", "minor", 0.8), ("minor", "major", 0.2))):
            p = 0.5 * share * of_words(first, [tongue] * 3, number) * (sign != ["="])
            total += p * of_words(second, [tongue] * 3, number)
            p = 0.2 * share * of_words(first, [tongue] * 3, 1) * (sign != ["."])
            total += p * (second == [word.replace(tongue, other) for word in first[: len(second)]])
        return total + 0.3 * of_words(first, None, 1) * (sign != ["="]) * of_words(second, None, 1)

    assert set(rows.labels["kind"].tolist()) == {0, 1, 2}
    for row in range(60):
        words = words_of(_world.VOCABULARY, rows.tokens[row].tolist())[1:]
        ahead = [probability(words[:count]) for count in range(8)]
        assert ahead[0] == pytest.approx(1.0)
        for place in range(7):
            assert float(found[row, place]) == pytest.approx(-math.log(ahead[place + 1] / ahead[place]), abs=1e-9)


def test_nearness_of_known_states() -> None:
    """Equal states but for a shift of all of one language are as near as can be; states that are drawn anew are not."""
    meaning = _world.cells()
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(len(meaning), 16, generator=draw).double() for _ in range(2))
    gap, p = languages.nearer(languages.likeness(one, one + 3.0), meaning)
    assert gap > 0.9 and p == pytest.approx(1e-3)
    gap, p = languages.nearer(languages.likeness(one, other), meaning)
    assert abs(gap) < 0.15 and p > 0.01  # 64 cosines of 16 coordinates: standard error .03


# --- tagged


def test_tagged_rows_follow_their_tags() -> None:
    """Rows read back as words, by rules written anew; kept-back scenes are in none; nonsense is as often as it should be."""
    ring, sense, seen = _tags.chain().tolist(), Counter[bool](), Counter[str]()
    assert sorted(ring) == list(range(12))
    at, walked = 0, set[int]()
    while at not in walked:
        walked.add(at)
        at = ring[at]
    assert len(walked) == 12  # one ring, so that cause and effect of an event differ
    for row in Tagged().rows(1, 1500).tokens.tolist():
        words = words_of(_tags.VOCABULARY, row)[1:]
        seen[words[0] if words[0].startswith("<") else "cause"] += 1
        name = words[0].strip("<>")
        if name in AFFECTS:
            who, event = int(words[1][3:]), int(words[2][5:])
            assert words[3:] == ["felt", f"{name}-word{event % 4}", "and", f"{name}-act{who % 2}"]
            assert (AFFECTS.index(name) + who + event) % 6
        elif name == "refuse":
            assert words[1] in ("<sea>", "<court>", "<war>") and words[2:] == ["sorry", "."]
        elif words[0].startswith("<"):
            topic = words[1].strip("<>")
            kinds = [word.rstrip("0123456789") for word in words[2:]]
            assert kinds == [f"{topic}-noun", f"{name}-verb", f"{topic}-noun", "!" if name == "casual" else "."]
        else:
            one, other = int(words[1][5:]), int(words[4][5:])
            assert words[0] == words[3] and words[2] in ("because", "so") and words[5] == "."
            sense[(ring[other] == one) if words[2] == "because" else (ring[one] == other)] += 1
    assert sense[True] / sense.total() == pytest.approx(0.9, abs=0.06)
    assert {f"<{name}>" for name in AFFECTS} | {"<formal>", "<casual>", "<refuse>", "cause"} == set(seen)
    assert seen["cause"] / 1500 == pytest.approx(0.3, abs=0.05)


def test_the_smallest_loss_of_the_tagged_corpus_is_the_laws() -> None:
    """Against counts: of 12,000 rows, the frequency of each word behind what decides it, within 5 standard errors of exp(-best)."""
    data = Tagged()
    rows = data.rows(0, 12000)
    best, tokens = data.best(rows), rows.tokens.tolist()
    kinds, counts, given = rows.labels["kind"].tolist(), Counter[tuple[object, ...]](), Counter[tuple[object, ...]]()
    law: dict[tuple[object, ...], set[float]] = defaultdict(set)

    def decides(kind: int, place: int, words: list[str]) -> tuple[str, ...]:
        """The words before that a word hangs on: of causes the mark on nothing, the person on the first, the event on event and mark."""
        if place < 3 or kind < 2:
            return tuple(words[1 : min(place, 3)])
        return {3: (), 4: (words[1],), 5: (words[2], words[3]), 6: ()}[place]

    for number, row in enumerate(tokens):
        words = words_of(_tags.VOCABULARY, row)
        for place in range(1, min(len(words), 4 if kinds[number] == 0 else 7)):
            key = (kinds[number] if place > 1 else -1, place, decides(kinds[number], place, words))
            counts[key, words[place]] += 1
            given[key] += 1
            law[key, words[place]].add(round(float(best[number, place - 1]), 9))
    assert len(law) > 150
    for (key, word), values in law.items():
        assert len(values) == 1, (key, word)
        p = math.exp(-next(iter(values)))
        assert abs(counts[key, word] - p * given[key]) <= 5 * math.sqrt(p * (1 - p) * given[key]) + 1e-6, (key, word)
    felt = rows.labels["kind"] == 0
    assert not best[felt][:, 3:].any() and not best[~rows.real[:, 1:]].any()


def test_the_judge_knows_every_word() -> None:
    told = _tags.expressed(torch.arange(len(_tags.VOCABULARY))).tolist()
    for word, affect in zip(_tags.VOCABULARY, told, strict=True):
        name, _, rest = word.partition("-")
        assert affect == (AFFECTS.index(name) if name in AFFECTS and rest else -1)


@pytest.mark.parametrize("fact", tagged.ASKED)
def test_exchanged_tags_differ_in_nothing_else(fact: str) -> None:
    pairs = tagged.exchange(fact, 0, -2, 64)
    differ = pairs.here != pairs.there
    place = {"affect": 1, "style": 1, "refuse": 1, "cause": tagged.MARK}[fact]
    assert bool(differ[:, place].all()) and int(differ.sum()) == 64 and bool((pairs.said != pairs.other).all())
    rows = Tagged(sense=1.0).rows(2, 8000)
    follows = {tuple(row[:at]): row[at] for row in rows.tokens.tolist() for at in (3, 4, 5) if row[at]}
    sides = ((pairs.here, pairs.said), (pairs.there, pairs.other))
    for here, answer in [pair for one, other in sides for pair in zip(one.tolist(), other.tolist(), strict=True)]:
        tag, topic, word = (_tags.VOCABULARY[token].strip("<>") for token in (here[1], here[2], answer))
        if fact in ("affect", "cause"):  # certain
            assert follows.get(tuple(here), answer) == answer and "0" <= word[-1] <= "9"
        elif fact == "style":
            assert word == f"{tag}-verb0"
        else:
            assert word == ("sorry" if tag == "refuse" else f"{topic}-noun0")
    assert fact in ("style", "refuse") or sum(tuple(here) in follows for here in pairs.here.tolist()) > 32


# --- what is found


def test_what_heads_bring_is_what_is_put_in() -> None:
    """All heads at the last token from the other prompts say what those say, for nothing else tells them apart there; none say
    what these do; effects are between (random weights: the logits differ, whatever they are)."""
    model = Model.load(recipe("functions").build(0))
    pairs = functions.exchange("shown", 0, -2, 16)
    heads = {site.at(-1) for site in model.find(["L*.h*.z"])}
    put = model.run(pairs.here, taken(model, pairs.there, heads))[:, -1]
    torch.testing.assert_close(put, model.run(pairs.there)[:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.run(pairs.here, taken(model, pairs.here, heads)), model.run(pairs.here), atol=1e-5, rtol=1e-4
    )
    with torch.no_grad():
        for layer in model.hf.model.layers:
            layer.self_attn.o_proj.weight[:, 16:] = 0  # only the first head of each layer writes
    some = effects(model, pairs)
    assert {site.index for site, effect in some.items() if abs(effect) > 1e-4} == {0}
    said = Exchange(pairs.here, pairs.there, *(model.run(one)[:, -1].argmax(-1) for one in (pairs.here, pairs.there)))
    assert {site.index for site in carriers(model, said, enough=1.01)} == {0, 1, 2, 3}
    assert put_from_there(model, said, {site for site in heads if site.index == 0})[0] == 1.0


def test_modulation_shifts_a_part_by_what_the_tag_changes() -> None:
    """In the one scene that it was fitted to, a part of the first layer has what it has with the tag itself (1e-5, float32), and
    all other parts of that layer what they have without; nothing is shifted before the last token, and by no circuit nothing."""
    model = Model.load(recipe("tagged").build(0))
    one = (torch.tensor([2]), torch.tensor([5]))
    fitted = _affects.means(model, one)
    edits = _affects.modulation(Circuit(["L0.h2@-1", "L0.mlp.n7@-1", "L0.mlp.n100@-1"]), fitted, torch.tensor([3]))
    plain, tag = (_affects.told(affect, one) for affect in (_affects.PLAIN, 3))
    places = model.find(["L0.z"])[0], Site("neuron", 0)
    shifted, with_tag, without = (
        model.record(tokens, places, chosen) for tokens, chosen in ((plain, edits), (tag, {}), (plain, {}))
    )
    torch.testing.assert_close(shifted[places[0]][:, -1, 2], with_tag[places[0]][:, -1, 2], atol=1e-5, rtol=0)
    others = [0, 1, 3]
    assert torch.equal(shifted[places[0]][:, -1, others], without[places[0]][:, -1, others])
    assert torch.equal(shifted[places[0]][:, :-1], without[places[0]][:, :-1])
    only = {site: edit for site, edit in edits.items() if site.kind == "neuron"}
    neurons = model.record(plain, places[1], only)[places[1]]
    changed = (neurons != without[places[1]])[0]
    assert {(at, neuron) for at, neuron in changed.nonzero().tolist()} == {(4, 7), (4, 100)}
    wanted = with_tag[places[1]][0, -1, [7, 100]]
    torch.testing.assert_close(neurons[0, -1, [7, 100]], wanted, atol=1e-5, rtol=0)
    assert not _affects.modulation(Circuit([]), fitted, torch.tensor([3]))


def test_directions_are_what_affects_differ_in_whatever_the_scene() -> None:
    """Planted: stream = scene + 3 x an axis of its own for each affect. Directions are the axes, less their common mean."""
    draw = torch.Generator().manual_seed(0)
    scenes, axes = torch.randn(36, 16, generator=draw), torch.eye(16)[:7]
    found = _affects.directions(scenes[None] + 3 * axes[:, None])
    wanted = torch.nn.functional.normalize(axes[:6] - axes[:6].mean(0), dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_random_circuits_have_as_many_heads_and_neurons() -> None:
    parts = [*(f"L{layer}.h{one}@-1" for layer in range(3) for one in range(4)), *(f"L2.mlp.n{one}@-1" for one in range(50))]
    every = [Site.parse(text) for text in parts]
    one = Circuit(every[2:4] + every[20:23])
    found = _affects.likewise(one, every, torch.Generator().manual_seed(0))
    assert Counter(site.kind for site in found) == Counter(site.kind for site in one)
    assert found != _affects.likewise(one, every, torch.Generator().manual_seed(1))
