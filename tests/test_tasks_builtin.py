"""Built-in tasks: every file of the folder, on the tokenizers of real models and on small ones with other rules for digits."""

import json
import re
from collections import Counter
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchclamp.errors import TaskError
from patchclamp.metrics import METRICS
from patchclamp.tasks import Examples, Split, load_task, task_names
from small_tokenizers import byte_level, words

NAMES = task_names()
REAL = ("gpt2", "gpt-neox-20b")
N = 208

ONE_WORD = {"ioi", "induction", "gendered_pronoun", "agreement", "addition", "docstring", "greater_than", "capitals"}
"""Tasks whose clean and corrupt prompts differ in one token (in capitals: where the country is one)."""


@cache
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@cache
def drawn(name: str, folder: Path) -> Split:
    return load_task(name).split(tokenizer(folder), N)


def all_of(parts: Split) -> list[Any]:
    return [one for part in parts for one in part]


def text(tokens: tuple[int, ...], folder: Path) -> str:
    return str(tokenizer(folder).decode(list(tokens)))


def test_the_folder_holds_the_tasks_that_are_promised() -> None:
    """The names of part 3 of the plan."""
    assert set(NAMES) >= {
        "ioi", "greater_than", "induction", "gendered_pronoun", "name_recall", "agreement", "capitals", "coloured_objects",
        "addition", "docstring", "multiple_choice", "facts", "icl", "binding",
    }  # fmt: skip


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("name", NAMES)
def test_pairs_fit_real_tokenizers(shared: Path, name: str, real: str) -> None:
    """At least 200 pairs that align, whose answers are single tokens, follow the prompt in the tokenizer's own words, and
    whose sets are disjoint."""
    folder = shared / "tokenizers" / real
    parts = drawn(name, folder)
    found = all_of(parts)
    assert len(found) >= 200 and all(len(part) >= N // 8 for part in parts)
    assert len({one.key for one in found}) == len(found)
    for one in found:
        assert one.corrupt is not None and len(one.corrupt) == len(one.clean) and one.corrupt != one.clean
        assert all(len(answer) == 1 for answer in one.answers + one.wrong)
        assert not set(one.answers) & set(one.wrong)
        assert one.spans["end"] == (len(one.clean) - 1, len(one.clean)) and len(one.spans) > 1
    for one in found[::4]:  # the encoding checks each; this asks the tokenizer again, from the text alone
        if isinstance(one.pair.clean, str) and isinstance(one.pair.corrupt, str):
            sides = [(one.pair.clean, one.clean), (one.pair.corrupt, one.corrupt)]
            said = [text(answer, folder) for answer in (one.answers[0], one.wrong[0])]
            joined = tokenizer(folder)([prompt + more for prompt, _ in sides for more in ("", *said)])["input_ids"]
            assert joined == [[*tokens, *more] for _, tokens in sides for more in ((), one.answers[0], one.wrong[0])]
    for part, other in ((parts.fit, parts.select), (parts.fit, parts.confirm), (parts.select, parts.confirm)):
        sides = [{prompt for one in side for prompt in (one.clean, one.corrupt)} for side in (part, other)]
        assert not sides[0] & sides[1]
        assert not {one.group for one in part} & {one.group for one in other}


@pytest.mark.parametrize("name", NAMES)
def test_clean_and_corrupt_differ_only_where_said(shared: Path, name: str) -> None:
    """In the tasks of one fact, exactly one token differs, and it lies in the span that the task names for it."""
    where = {
        "ioi": ["S2"], "induction": ["target"], "gendered_pronoun": ["name"], "agreement": ["subject"], "addition": ["b"],
        "docstring": ["arg3"], "greater_than": ["start"], "capitals": ["country"], "facts": ["subject"], "icl": ["query"],
        "coloured_objects": ["query1", "query2"], "binding": ["query1", "query2"], "name_recall": ["name1", "name2"],
        "multiple_choice": [f"option{i}" for i in range(1, 5)],
    }[name]  # fmt: skip
    for one in all_of(drawn(name, shared / "tokenizers" / "gpt2")):
        changed = {i for i, (a, b) in enumerate(zip(one.clean, one.corrupt, strict=True)) if a != b}
        allowed = {i for span in where if span in one.spans for i in range(*one.spans[span])}
        assert changed and changed <= allowed
        if name in ONE_WORD:
            assert len(changed) == 1


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_balance(shared: Path, name: str) -> None:
    """The same seed gives the same pairs, another one others; no answer makes up much more than its share."""
    there = load_task(name)
    first, again, other = (there.examples(tokenizer(shared / "tokenizers" / "gpt2"), 12, seed) for seed in (0, 0, 1))
    assert [one.key for one in first] == [one.key for one in again] != [one.key for one in other]
    choices = {"agreement": 2, "gendered_pronoun": 2, "multiple_choice": 4}.get(name, 5)
    assert Examples(tuple(all_of(drawn(name, shared / "tokenizers" / "gpt2"))), first.tokenizer).majority < 1.3 / choices


@pytest.mark.parametrize("name", NAMES)
def test_prompts_read_well(shared: Path, name: str) -> None:
    """No unfilled slot, no double blank, no blank before a mark or at the end, and "a" and "an" as spoken."""
    for one in all_of(drawn(name, shared / "tokenizers" / "gpt2")):
        if not isinstance(one.pair.clean, str):
            continue
        for prompt in (one.pair.clean, one.pair.corrupt):
            assert not re.search(r"[{}]|[^\n ]  |\s$| [,.?!]", prompt), prompt
            assert not re.search(r"\b[Aa] [aeio]|\ban (?!hour\b)[^aeiou]", prompt), prompt


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ioi", {"template": "ABBA", "counterfactual": "abc"}),
        ("ioi", {"template": "BABA", "counterfactual": "s1_io_flip"}),
        ("greater_than", {"corrupt": "year"}),
        ("induction", {"length": "8"}),
        ("agreement", {"attractor": "opposite"}),
        ("agreement", {"attractor": "none"}),
        ("addition", {"form": "words"}),
        ("addition", {"digits": 1}),
        ("multiple_choice", {"corrupt": "symbols"}),
        ("facts", {"relation": "athlete"}),
        ("icl", {"form": "instruction"}),
        ("icl", {"corrupt": "labels", "shots": "3"}),
        *[("icl", {"map": name}) for name in ("past", "plural", "french", "capital")],
        ("binding", {"corrupt": "attributes", "entities": 2}),
    ],
)
def test_options(shared: Path, name: str, options: dict[str, Any]) -> None:
    """Every option gives pairs; it is in the hash."""
    there = load_task(name, **options)
    assert len(there.examples(tokenizer(shared / "tokenizers" / "gpt2"), 40)) == 40
    assert there.hash != load_task(name).hash


def test_ioi_orders_and_counterfactuals(shared: Path) -> None:
    """ABBA: the indirect object first. The flip changes the second subject, the swap both names, abc all three."""
    real = tokenizer(shared / "tokenizers" / "gpt2")
    for order, sign in (("ABBA", -1), ("BABA", 1)):
        for one in load_task("ioi", template=order).examples(real, 20):
            assert (one.spans["IO"][0] - one.spans["S1"][0]) * sign > 0
            assert one.clean[one.spans["IO"][0]] == one.answers[0][0]
            assert one.clean[one.spans["S1"][0]] == one.clean[one.spans["S2"][0]] == one.wrong[0][0]
            assert one.corrupt is not None and one.corrupt[one.spans["S2"][0]] == one.answers[0][0]
    for one in load_task("ioi", counterfactual="s1_io_flip").examples(real, 20):
        places = [one.spans[name][0] for name in ("IO", "S1", "S2")]
        assert one.corrupt is not None
        assert [one.corrupt[i] for i in places] == [one.wrong[0][0], one.answers[0][0], one.wrong[0][0]]
    for one in load_task("ioi", counterfactual="abc").examples(real, 20):
        assert one.corrupt is not None and not {one.answers[0][0], one.wrong[0][0]} & set(one.corrupt)
        with pytest.raises(TaskError, match="cannot be mirrored"):
            one.mirror()


def test_agreement_attractors(shared: Path) -> None:
    """The attractor has the number that was asked for; there is none where none was."""
    real = tokenizer(shared / "tokenizers" / "gpt2")
    for kind in ("same", "opposite", "none"):
        for one in load_task("agreement", attractor=kind).examples(real, 20):
            assert ("attractor" in one.spans) is (kind != "none")
            if kind != "none":
                plural = [real.decode(list(one.clean[slice(*one.spans[s])])).endswith("s") for s in ("subject", "attractor")]
                assert (plural[0] == plural[1]) is (kind == "same")


def test_greater_than_on_pairs_of_digits(shared: Path) -> None:
    """Right are the years above the start and wrong those up to it, as two-digit tokens."""
    real = tokenizer(shared / "tokenizers" / "gpt2")
    for one in load_task("greater_than").examples(real, 40):
        start = int(real.decode(list(one.clean[slice(*one.spans["start"])])))
        right, wrong = ({int(real.decode(list(answer))) for answer in side} for side in (one.answers, one.wrong))
        assert min(right) > start >= max(wrong) and len(right | wrong) >= 60
        assert one.corrupt is not None and real.decode([one.corrupt[one.spans["start"][0]]]) == "01"


CORPUS = [f"The war lasted from the year {year} to the year {year + 9}." for year in range(1100, 2000, 7)]
CORPUS += [f"{a} + {b} = {a + b}. The sum of {a} and {b} is {a + b}." for a in range(10, 90, 7) for b in range(10, 90, 9)]


@pytest.mark.parametrize(("digits", "lengths"), [("single", {1: 2}), ("threes", {1: 3}), ("pairs", {1: 1})])
def test_numbers_whatever_the_digits(digits: str, lengths: dict[int, int]) -> None:
    """Digits split singly, in threes, in pairs: years and sums are there, right ones are right, and they split disjointly."""
    small = byte_level(CORPUS, digits)
    years = load_task("greater_than").split(small, 120)
    for one in (one for part in years for one in part):
        start = int(re.findall(r"\d\d(\d\d)", small.decode(list(one.clean)))[0])
        ends = [{int(str(small.decode(list(answer)))[-2:]) for answer in side} for side in (one.answers, one.wrong)]
        assert min(ends[0]) > start >= max(ends[1])
        assert {len(answer) for answer in one.answers + one.wrong} == {lengths[1]}
    sums = load_task("addition").split(small, 120)
    for one in (one for part in sums for one in part):
        for prompt, (answer,) in ((one.clean, one.answers), (one.corrupt, one.wrong)):
            a, b = map(int, re.findall(r"\d+", small.decode(list(prompt))))
            assert int(small.decode(list(answer))) == a + b
    for one in load_task("addition", digits=3).examples(small, 60):
        assert one.corrupt is not None and len(one.corrupt) == len(one.clean)
    batch = sums.fit.batch(range(4))
    assert len(batch) == 4 and set(batch.sign.tolist()) == ({1.0} if digits == "pairs" else {1.0, -1.0})


def test_tasks_on_a_tokenizer_of_words() -> None:
    """A small vocabulary of the task's own words is enough; one without them is an error that names the words."""
    for name in ("ioi", "agreement", "capitals"):
        there = load_task(name)
        seen = list(islice(there.candidates(Random(0), words(["a"])), 400))
        texts = [f"{pair.clean}{answer}{''.join(pair.wrong)}" for pair in seen for answer in pair.answer]  # type: ignore[arg-type]
        assert len(there.split(words(texts), 200).confirm) >= 25
    with pytest.raises(TaskError, match=r"'ioi' has 0 examples.*holds a word that the tokenizer does not know.*what failed: '"):
        load_task("ioi").examples(words(["The cat sat on the mat."]), 5)


def test_unknown_tasks_and_options() -> None:
    """Each message says what there is."""
    with pytest.raises(TaskError, match=r"there is no task 'iio' \(did you mean ioi\?\): built in are addition, agreement"):
        load_task("iio")
    with pytest.raises(TaskError, match="'ioi' has no option 'colour': there are template=both, counterfactual=s2_io_flip"):
        load_task("ioi", colour="red")
    with pytest.raises(TaskError, match="option 'template' of 'ioi' cannot be 'ABAB': choose from both, ABBA, BABA"):
        load_task("ioi", template="ABAB")
    with pytest.raises(TaskError, match="option 'length' of 'induction' must be of type int, not 'many'"):
        load_task("induction", length="many")
    with pytest.raises(TaskError, match="induction over 2 tokens"):
        load_task("induction", length=2)
    with pytest.raises(TaskError, match="'name_recall' has no option 'x': there are none"):
        load_task("name_recall", x=1)


# the real models under the shared folder


def shares(model: Any, examples: Examples) -> tuple[float, float]:
    """Share of examples with logit difference above zero, and mean share of targets whose answer comes first."""
    right, first = [], []
    for batch in examples.batches(256):
        with torch.no_grad():
            out = model(batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids).logits
        logits = out[batch.target_row, batch.target_position][None]
        right.append(METRICS["logit_diff"](logits, batch)[0] > 0)
        first.append(METRICS["top1"](logits, batch)[0])
    return torch.cat(right).double().mean().item(), torch.cat(first).double().mean().item()


def test_the_adder_adds(shared: Path) -> None:
    """All three digits of mingpt-adder, last first, as one answer of three tokens, within its context of six."""
    folder = shared / "models" / "mingpt-adder-gpt2"
    examples = load_task("addition", form="reversed").examples(tokenizer(folder), 200)
    assert {len(one.answers[0]) for one in examples} == {3} and {len(one.clean) for one in examples} == {4}
    assert examples.batch().tokens.shape[1] == 6
    assert shares(AutoModelForCausalLM.from_pretrained(folder), examples) == (1.0, 1.0)


def test_the_sorter_sorts(shared: Path) -> None:
    """Whole answers of mingpt-sort from rows."""
    folder = shared / "models" / "mingpt-sort-gpt2"
    prompts = ["".join("012"[i // 3**k % 3] for k in range(6)) for i in range(0, 729, 5)]
    rows = [
        {"clean": a, "corrupt": b, "answer": "".join(sorted(a)), "wrong": "".join(sorted(b))}
        for a, b in pairwise(prompts)
        if sorted(a) != sorted(b)
    ]
    examples = load_task(rows).examples(tokenizer(folder))
    assert len(examples) == len(rows) > 100
    assert shares(AutoModelForCausalLM.from_pretrained(folder), examples) == (1.0, 1.0)


def test_sophia_knows_its_answers(shared: Path) -> None:
    """Whole answers of sophia-byte: one of the training answers is what it says; without wrong answers the metric is nll."""
    folder = shared / "models" / "sophia-byte-llama"
    told = json.loads((folder / "qa.json").read_text())
    rows = [{"clean": f"{question}:", "answer": f" {answers[0]}"} for question, answers in told.items() if len(answers) == 1]
    there = load_task(rows)
    assert there.metric == "nll"
    examples = there.examples(tokenizer(folder))
    assert len(examples) > 20 and Counter(len(one.answers) for one in examples) == {1: len(examples)}
    right, first = shares_without_wrong(AutoModelForCausalLM.from_pretrained(folder), examples)
    assert right > 0.95 and first < 0.2


def shares_without_wrong(model: Any, examples: Examples) -> tuple[float, float]:
    """Mean share of answer tokens that come first, and mean nll."""
    batch = examples.batch()
    with torch.no_grad():
        out = model(batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids).logits
    logits = out[batch.target_row, batch.target_position][None]
    return METRICS["top1"](logits, batch).mean().item(), METRICS["nll"](logits, batch).mean().item()


@pytest.mark.parametrize(
    ("model", "rows", "count"),
    [
        ("stories260k-llama", "stories260k-pronoun", 400),
        ("stories260k-llama", "stories260k-name-recall", 720),
        ("tinystories-656k-llama", "tinystories-656k-name-recall", 132),
    ],
)
def test_story_behaviours_are_there(shared: Path, model: str, rows: str, count: int) -> None:
    """The accuracies of the folder's README: all pairs right, and all wrong on the corrupt prompts."""
    folder = shared / "models" / model
    examples = load_task(str(shared / "data" / "story-behaviours" / f"{rows}.jsonl")).examples(tokenizer(folder))
    assert len(examples) == count and not examples.dropped
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert shares(loaded, examples)[0] == 1.0
    batch = examples.batch().swapped()
    with torch.no_grad():
        out = loaded(batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids).logits
    assert (METRICS["logit_diff"](out[batch.target_row, batch.target_position][None], batch) < 0).all()
