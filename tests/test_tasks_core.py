"""Tasks, the core: encoding, batches, examples, splits."""

import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import tiny
from patchclamp.errors import AlignmentError, TaskError
from patchclamp.metrics import METRICS
from patchclamp.tasks import Batch, Example, Examples, Pair, Task, load_task
from small_tokenizers import Slow, byte_level, words

TEXT = "When Mary and John went to the store, John gave a drink to"
WORDS = words([TEXT, " Paul met Anna Lisa", "She He she he is are one two three four five six seven eight nine ten"])


def task(pairs: Sequence[Pair], **changes: object) -> Task:
    return replace(Task("mine", "mine", lambda _rng, _tokenizer: iter(pairs), size=len(pairs)), **changes)  # type: ignore[arg-type]


def ids(text: str) -> tuple[int, ...]:
    return tuple(WORDS([text], add_special_tokens=False)["input_ids"][0])


def pair(**changes: object) -> Pair:
    fields = {"clean": TEXT, "answer": " Mary", "corrupt": TEXT.replace(", John", ", Mary"), "wrong": " John"}
    return Pair(**{**fields, **changes})  # type: ignore[arg-type]


# encoding


def test_prompt_answer_and_spans_are_the_tokenizers_own() -> None:
    """Ids are those of the text; a span covers the tokens that hold its characters."""
    start = TEXT.index("John gave")
    one = task([pair(spans={"IO": (5, 9), "S2": (start, start + 4)})]).examples(WORDS)[0]
    assert one.clean == ids(TEXT)
    assert (one.answers, one.wrong) == ((ids(" Mary"),), (ids(" John"),))
    assert one.corrupt is not None and len(one.corrupt) == len(one.clean)
    covered = {name: WORDS.decode(list(one.clean[a:b])) for name, (a, b) in one.spans.items()}
    assert covered == {"IO": " Mary", "S2": " John", "end": " to"}


def test_spans_without_offsets_are_the_same() -> None:
    """A tokenizer that knows no character offsets gives the same spans, inside words and across them."""
    tokenizer = byte_level([TEXT], size=300)
    spans = {f"{a}-{b}": (a, b) for a, b in [(0, 4), (5, 9), (5, 18), (14, 18), (22, 29), (38, 47)]}
    there = task([pair(spans=spans)])
    fast, slow = there.examples(tokenizer)[0], there.examples(Slow(tokenizer))[0]
    assert dict(fast.spans) == dict(slow.spans)


def test_answer_that_merges_with_the_prompt_is_dropped_and_named() -> None:
    """tokenize(prompt + answer) must begin with the prompt's ids: a prompt that ends in a blank breaks this."""
    tokenizer = byte_level([TEXT + " Mary Mary Mary"])
    with pytest.raises(TaskError, match=r"1 dropped: answer merges with the end of the prompt\); what failed: 'Mary'"):
        task([Pair("gave a drink to ", "Mary")]).examples(tokenizer)


def test_pairs_that_do_not_align_are_dropped_and_named() -> None:
    """Unequal lengths are an AlignmentError where nothing is left, and counted where something is."""
    bad = pair(corrupt=TEXT.replace(", John", ", Mary Anna"))
    with pytest.raises(AlignmentError, match=r"has 0 examples.*different numbers of tokens.*John/Mary Anna"):
        task([bad]).examples(WORDS)
    examples = task([bad, pair()]).examples(WORDS)
    assert len(examples) == 1
    assert dict(examples.dropped) == {"clean and corrupt do not align: they have different numbers of tokens": 1}
    assert examples.failed == ("John/Mary Anna",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": " Zoe"}, "holds a word that the tokenizer does not know.*' Zoe'|'Zoe'"),
        ({"answer": " John"}, "answer and wrong answer are the same"),
        ({"corrupt": TEXT}, "clean and corrupt are the same"),
        ({"answer": (" Mary Anna", " Anna")}, "alternatives must be single tokens.*' Mary Anna'"),
    ],
)
def test_misfits_say_why(changes: dict[str, object], reason: str) -> None:
    """Each rule of the encoding has its own reason, with the words."""
    with pytest.raises(TaskError, match=reason):
        task([pair(**changes)]).examples(WORDS)


def test_single_token_tasks_drop_longer_answers() -> None:
    """Where answers must be single tokens, a longer one is named."""
    with pytest.raises(TaskError, match=r"answer of several tokens.*' Mary Anna'"):
        task([pair(answer=" Mary Anna")], single=True).examples(WORDS)


def test_too_few_says_how_many_and_how_many_were_needed() -> None:
    """The message has both numbers."""
    with pytest.raises(
        TaskError, match=r"'mine' has 1 examples that fit this tokenizer, and 5 are needed \(1 dropped: drawn before\)"
    ):
        task([pair(), pair()]).examples(WORDS, 5)


@pytest.mark.parametrize(("bos", "first"), [(None, [0]), (True, [0]), (False, [])])
def test_bos_as_the_tokenizer_does_once_or_never(bos: bool | None, first: list[int]) -> None:
    """A tokenizer that adds BOS: kept, kept once, left out; spans move along."""
    tokenizer = byte_level([TEXT], bos=True)
    one = task([pair(spans={"IO": (5, 9)})], bos=bos).examples(tokenizer)[0]
    bare = tokenizer([TEXT], add_special_tokens=False)["input_ids"][0]
    assert list(one.clean) == first + bare
    assert one.spans["IO"] == (len(first) + 1, len(first) + 2)
    if bos is None:
        assert list(one.clean) == tokenizer([TEXT])["input_ids"][0]


def test_bos_on_token_ids() -> None:
    """Token ids are taken as they are, unless BOS is asked for or refused."""
    rows = [Pair((1, 4, 5), (6,)), Pair((4, 5, 7), (6,))]
    starts = {bos: [one.clean for one in task(rows, bos=bos).examples(WORDS)] for bos in (None, True, False)}
    assert starts == {
        None: [(1, 4, 5), (4, 5, 7)],
        True: [(1, 4, 5), (1, 4, 5, 7)],
        False: [(4, 5), (4, 5, 7)],
    }


def test_prompt_longer_than_the_model_takes() -> None:
    """The tokenizer's own limit holds for the prompt and all answer tokens but the last."""
    tokenizer = words([TEXT])
    tokenizer.model_max_length = len(ids(TEXT))
    assert len(task([pair()]).examples(tokenizer)) == 1
    tokenizer.model_max_length -= 1
    with pytest.raises(TaskError, match="longer than the 13 tokens"):
        task([pair()]).examples(tokenizer)


# batches


def test_rows_of_single_token_answers() -> None:
    """One row an example, left-padded; lists fill up with -1."""
    rows = [
        Pair("one two three", (" four", " five"), "one two six", (" seven",)),
        Pair("one two three four five", " six", "one two three four six", (" seven", " eight")),
    ]
    batch = task(rows).examples(WORDS).batch()
    a, b = ids("one two three"), ids("one two three four five")
    assert batch.tokens.tolist() == [[0, 0, *a], [*b]]
    assert batch.mask.tolist() == [[False, False, True, True, True], [True] * 5]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch.corrupt is not None and batch.corrupt[0].tolist() == [0, 0, *ids("one two six")]
    assert batch.target_row.tolist() == [0, 1] and batch.target_position.tolist() == [4, 4]
    assert batch.answers.tolist() == [[*ids(" four"), *ids(" five")], [*ids(" six"), -1]]
    assert batch.wrong is not None and batch.wrong.tolist() == [[*ids(" seven"), -1], [*ids(" seven"), *ids(" eight")]]
    assert batch.example.tolist() == [0, 1] and batch.sign.tolist() == [1.0, 1.0]
    assert batch.spans["end"].tolist() == [[4, 5], [4, 5]] and len(batch) == 2


def test_rows_of_longer_answers() -> None:
    """Teacher forcing: prompt + answer[:-1] on both sides, a target per answer token, wrong answers in rows with sign -1."""
    rows = [
        Pair("one two", " three four five", "one six", " seven eight", {"second": (4, 7)}),
        Pair("one two three", (" four", " five"), "one two six", " seven"),
    ]
    batch = task(rows).examples(WORDS).batch()
    right, wrong = ids("one two three four"), ids("one two seven")
    assert batch.tokens.tolist() == [[*right], [0, *wrong], [0, *ids("one two three")], [0, *ids("one two three")]]
    assert batch.corrupt is not None
    assert batch.corrupt[:2].tolist() == [[*ids("one six three four")], [0, *ids("one six seven")]]
    assert batch.example.tolist() == [0, 0, 1, 1] and batch.sign.tolist() == [1.0, -1.0, 1.0, -1.0]
    assert batch.target_row.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert batch.target_position.tolist() == [1, 2, 3, 2, 3, 3, 3]
    said = [ids(" three"), ids(" four"), ids(" five"), ids(" seven"), ids(" eight"), ids(" four five"), ids(" seven")]
    assert batch.answers.tolist() == [[*one, -1][:2] for one in said] and batch.wrong is None
    assert batch.spans["end"].tolist() == [[1, 2], [2, 3], [3, 4], [3, 4]]
    assert batch.spans["answer"].tolist() == [[1, 4], [2, 4], [3, 4], [3, 4]]
    assert batch.spans["second"].tolist() == [[1, 2], [2, 3], [0, 0], [0, 0]]


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        out = model(batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids).logits
    return out[batch.target_row, batch.target_position][None]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_and_batching_change_no_number(family: str) -> None:
    """Prompts of unequal length, answers of unequal length: each example's number is what it is alone, unpadded."""
    model = tiny(family, attention="sdpa", dtype=torch.float64)  # eager Llama in float64 makes NaN of padded rows
    rng = random.Random(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 97) for _ in range(length))

    rows = [Pair(draw(n), (draw(k),), draw(n), (draw(w),)) for n, k, w in [(3, 1, 1), (9, 1, 1), (5, 3, 2), (12, 2, 4)]]
    examples = task(rows).examples(WORDS)
    together = METRICS["logit_diff"](logits(model, examples.batch()), examples.batch())[0]
    for i, row in enumerate(rows):
        said = []
        for (answer,) in (row.answer, row.wrong):
            assert isinstance(answer, tuple) and isinstance(row.clean, tuple)
            with torch.no_grad():
                scores = model(torch.tensor([row.clean + answer])).logits[0].log_softmax(-1)
            said.append(torch.stack([scores[len(row.clean) - 1 + t, token] for t, token in enumerate(answer)]).mean())
        torch.testing.assert_close(together[i], said[0] - said[1], rtol=1e-9, atol=1e-9)
        alone = METRICS["logit_diff"](logits(model, examples.batch([i])), examples.batch([i]))[0, 0]
        torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-9)


def test_batches_cover_all_in_order() -> None:
    """batches(size) is the examples in order; the last is what is left."""
    examples = load_task("induction", length=5).examples(WORDS, 7)
    found = [one for batch in examples.batches(3) for one in batch.examples]
    assert found == list(examples) and [len(batch) for batch in examples.batches(3)] == [3, 3, 1]
    with pytest.raises(TaskError, match="batch of no examples"):
        examples.batch([])
    with pytest.raises(TaskError, match="batches of 0"):
        next(examples.batches(0))


# plain text


def test_text_windows_predict_each_token_once() -> None:
    """Windows tile the text; every token with something before it is a target, at the position before it."""
    text = " ".join(["one two three four five six seven eight nine ten"] * 3)
    whole = ids(text)
    examples = task([Pair(text)], window=8, metric="nll").examples(WORDS)
    assert [token for one in examples for token in one.clean] == list(whole)
    assert all(one.targets == tuple(range(1, len(one.clean))) for one in examples)
    batch = examples.batch()
    assert batch.wrong is None and batch.corrupt is None
    hit = batch.tokens[batch.target_row, batch.target_position + 1]
    assert hit.tolist() == batch.answers[:, 0].tolist() and len(hit) == len(whole) - len(examples)
    assert len({one.group for one in examples}) == len(examples)


def test_text_windows_begin_with_bos_where_the_tokenizer_adds_it() -> None:
    """With BOS each window has it, and then every token of the text is a target."""
    tokenizer = byte_level([TEXT], bos=True)
    examples = task([Pair(TEXT)], window=6, metric="nll").examples(tokenizer)
    assert all(one.clean[0] == 0 and one.targets == tuple(range(1, len(one.clean))) for one in examples)
    assert [token for one in examples for token in one.clean[1:]] == tokenizer([TEXT], add_special_tokens=False)["input_ids"][0]


def test_masked_spans_alone_are_targets() -> None:
    """Targets are the marked ranges."""
    (one,) = task([Pair(TEXT, targets=[(5, 9), (38, 42)])], metric="nll").examples(WORDS)
    assert [WORDS.decode([one.clean[t]]) for t in one.targets] == [" Mary", " John"]
    with pytest.raises(TaskError, match="no answers can be shuffled"):
        task([Pair(TEXT)]).examples(WORDS).shuffled_answers(0)


# examples


def test_mirrored_adds_each_pair_in_the_other_direction() -> None:
    """Clean and corrupt, answer and wrong change places; what is there already is not doubled; twice changes nothing."""
    one = Pair("one two", " three", "one four", " five")
    examples = task([one]).examples(WORDS)
    both = examples.mirrored()
    assert [(e.clean, e.corrupt, e.answers, e.wrong) for e in both] == [
        (ids("one two"), ids("one four"), (ids(" three"),), (ids(" five"),)),
        (ids("one four"), ids("one two"), (ids(" five"),), (ids(" three"),)),
    ]
    assert {e.key for e in both.mirrored()} == {e.key for e in both} and len(both.mirrored()) == 2
    assert examples.majority == 1.0 and both.majority == 0.5
    for other in (Pair("one two", " three"), replace_mirrors(one)):
        with pytest.raises(TaskError, match="cannot be mirrored"):
            task([other]).examples(WORDS).mirrored()


def replace_mirrors(one: Pair) -> Pair:
    return Pair(one.clean, one.answer, one.corrupt, one.wrong, mirrors=False)


def test_shuffled_answers_permute_within_lengths() -> None:
    """Prompts stay, (answer, wrong) go round among answers of the same length; another seed, another permutation."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [Pair(f"one {n}", f" {n}", f"two {n}", " nine") for n in numbers]
    rows += [Pair(f"three {n}", f" {n} {n}", f"two {n}", " nine nine") for n in numbers]
    examples = task(rows).examples(WORDS)
    shuffled = examples.shuffled_answers(1)
    assert [e.clean for e in shuffled] == [e.clean for e in examples]
    for part in (slice(0, 8), slice(8, 16)):
        assert sorted(e.answers for e in shuffled.items[part]) == sorted(e.answers for e in examples.items[part])
    assert [e.answers for e in shuffled] != [e.answers for e in examples]
    assert [e.answers for e in shuffled] == [e.answers for e in examples.shuffled_answers(1)]
    assert [e.answers for e in shuffled] != [e.answers for e in examples.shuffled_answers(2)]


def test_examples_of_different_forms_do_not_mix() -> None:
    """All have a corrupt prompt or none."""
    with pytest.raises(TaskError, match="1 of 2 examples of 'mine' have 'corrupt'"):
        task([pair(), Pair("one two", " three", wrong=" four")]).examples(WORDS)


# splits


def prompts(examples: Examples) -> set[tuple[int, ...]]:
    return {prompt for one in examples for prompt in (one.clean, one.corrupt) if prompt is not None}


def check_disjoint(parts: Sequence[Examples]) -> None:
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            assert not prompts(one) & prompts(other)
            assert not {e.group for e in one} & {e.group for e in other}


@given(st.lists(st.tuples(st.integers(3, 90), st.integers(3, 90)), min_size=1, max_size=60), st.integers(0, 5))
def test_splits_share_no_prompt(links: list[tuple[int, int]], seed: int) -> None:
    """Whatever pairs share prompts: the sets are disjoint and complete, or it is said that they cannot be."""
    rows = [Pair((1, a), (2,), (1, b), (a,)) for a, b in links if a != b]
    if not rows:
        return
    there = task(rows)
    try:
        parts = there.split(WORDS, seed=seed)
    except TaskError as error:
        assert "cannot be split" in str(error)
        return
    check_disjoint(parts)
    whole = there.examples(WORDS)
    assert sorted(e.key for part in parts for e in part) == sorted(e.key for e in whole)
    assert all(len(part) >= max(1, share * len(whole) / 2) for part, share in zip(parts, (0.5, 0.25, 0.25), strict=True))
    assert [e.key for part in there.split(WORDS, seed=seed) for e in part] == [e.key for part in parts for e in part]


def test_splits_keep_groups_and_mirrors_together() -> None:
    """Groups of four and mirrored pairs stay whole; shares are 2 : 1 : 1."""
    rows = []
    for i in range(3, 83):
        one = Pair((1, i), (2,), (5, i), (3,), group=f"g{i // 4}")
        rows += [one, Pair(one.corrupt, one.wrong, one.clean, one.answer, group=one.group)]  # type: ignore[arg-type]
    parts = task(rows).split(WORDS, seed=3)
    check_disjoint(parts)
    assert [len(part) for part in parts] == [80, 40, 40]


def test_splits_that_cannot_be() -> None:
    """One prompt in all pairs: it says how many clusters there are."""
    rows = [Pair((1, 2), (3,), (1, i), (2,)) for i in range(4, 60)]
    with pytest.raises(
        TaskError, match=r"its 56 pairs share prompts or groups, so that they fall into 1 clusters, the largest of 56"
    ):
        task(rows).split(WORDS)


def test_seeds_set_what_is_drawn() -> None:
    """Same seed, same examples and split; another seed, others. A file keeps its order where all is taken."""
    rows = [Pair((1, i), (2,), (5, i), (3,)) for i in range(3, 83)]
    there = task(rows)
    assert [e.clean[1] for e in there.examples(WORDS)] == list(range(3, 83))
    first, again, other = (tuple(e.clean for e in there.examples(WORDS, 20, seed)) for seed in (0, 0, 1))
    assert first == again != other


# tasks


def test_hash_follows_content() -> None:
    """Options, special tokens, window and rows are in the hash; loading twice gives the same."""
    hashes = {
        load_task("ioi").hash,
        load_task("ioi", template="ABBA").hash,
        load_task("ioi", bos=True).hash,
        load_task("ioi", chat=True).hash,
        load_task("ioi", window=9).hash,
        load_task("binding").hash,
        load_task([{"clean": "a", "answer": " b"}]).hash,
        load_task([{"clean": "a", "answer": " c"}]).hash,
    }
    assert len(hashes) == 8
    assert load_task("ioi").hash == load_task("ioi").hash


def test_pairs_say_what_is_wrong_with_them() -> None:
    """Malformed fields are named."""
    for build, message in [
        (lambda: Pair(""), "'clean' is empty"),
        (lambda: Pair("a", corrupt="b"), "a pair needs an 'answer'"),
        (lambda: Pair("a", "b", (1, 2)), "must be of one form"),
        (lambda: Pair("a", "b", spans={"x": (3, 3)}), r"span 'x' must be \[start, end\]"),
        (lambda: Pair("a", ("b", "")), "an alternative is text or token ids, and not empty"),
        (lambda: Pair("a", "b", targets=[(0, 1)]), "'targets' marks what to predict in plain text"),
    ]:
        with pytest.raises(TaskError, match=message):
            build()


def test_a_span_beyond_the_text_is_an_error() -> None:
    """It is not silently cut."""
    with pytest.raises(TaskError, match="span 'far' ends at character 900"):
        task([pair(spans={"far": (1, 900)})]).examples(WORDS)


def test_preview_shows_tokens_answers_and_spans() -> None:
    """What a person reads before trusting a task."""
    text = task([pair(spans={"IO": (5, 9)}), pair(corrupt=TEXT + " a")]).preview(WORDS, 5)
    assert "clean    When| Mary| and| John" in text and "answer   ' Mary'" in text and "IO=' Mary'" in text
    assert "dropped 1: clean and corrupt do not align: they have different numbers of tokens" in text


def test_example_is_frozen() -> None:
    """Nobody writes into an example."""
    one = task([pair()]).examples(WORDS)[0]
    assert isinstance(one, Example)
    with pytest.raises(AttributeError):
        one.clean = ()  # type: ignore[misc]


def test_listing_tasks_loads_no_torch() -> None:
    """The command line lists and reads tasks without torch or transformers."""
    code = "import sys; from patchclamp.tasks import load_task, task_names; [load_task(n) for n in task_names()]; "
    code += "print(sorted({'torch', 'transformers', 'polars'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]"


def test_token_ids_that_the_tokenizer_does_not_know_are_counted_as_such() -> None:
    """Of a prompt of ids there is no word to name; the reason is told all the same."""
    from patchclamp.zoo._compile import tokenizer

    words = tokenizer(("<pad>", "<bos>", "<unk>", "a", "b"))
    unknown = Task("unknown", "ids", lambda rng, tokenizer: iter([Pair((1, 2, 3), (4,))]))
    with pytest.raises(TaskError, match="1 dropped: holds a word that the tokenizer does not know"):
        unknown.examples(words, 1)
