"""Compiled programs: logits against plain Python on every short input, and the three truths about edges."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from patchclamp import zoo
from patchclamp.errors import ModelError, TaskError
from patchclamp.models.doctor import examine
from patchclamp.models.model import Model
from patchclamp.tasks import Pair, load_task
from patchclamp.zoo.compiled import Compiled, build, programs
from patchclamp.zoo.compiled.rasp import INDICES
from patchclamp.zoo.compiled.truth import run, truth_of
from patchclamp.zoo.compiled.weights import SCALE, compile_program

EXACT = 1e-9  # float64 on multiples of 10 (or of shares): e^-50 leaks from every unselected position
ROUNDING = 1e-4  # float32


def share(words: tuple[str, ...], at: int, token: str) -> Fraction:
    return Fraction(words[: at + 1].count(token), at + 1)


def in_order(words: tuple[str, ...], at: int) -> str | None:
    return next((word for word in words if sum(other < word for other in words) == at), None)


def balanced(words: tuple[str, ...]) -> bool:
    depth = list(itertools.accumulate({"(": 1, ")": -1}.get(word, 0) for word in words))
    return depth[-1] == 0 and min(depth) >= 0


PLAIN: dict[str, Callable[[tuple[str, ...], int], object]] = {
    "reverse": lambda words, at: words[::-1][at],
    "xproportion": lambda words, at: share(words, at, "x"),
    "hist": lambda words, at: words.count(words[at]),
    "sort_unique": in_order,
    "pair_balance": lambda words, at: share(words, at, "(") - share(words, at, ")"),
    "shuffle_dyck": lambda words, _: balanced(words),
    "rotate": lambda words, at: (words[1:] + words[:1])[at],
    "palindrome": lambda words, at: words[at] == words[::-1][at],
    "duplicates": lambda words, at: words.count(words[at]) > 1,
    "often": lambda words, at: 2 * words[: at + 1].count("x") > at + 1,
}
"""Each program once more, as one would write it without attention."""

COUNTS = {
    "reverse": (77, 13, 10, 2), "xproportion": (23, 5, 5, 3), "hist": (8, 6, 6, 4), "sort_unique": (23, 10, 10, 6),
    "pair_balance": (46, 10, 10, 6), "shuffle_dyck": (388, 30, 25, 13), "rotate": (46, 12, 9, 2), "palindrome": (77, 15, 12, 4),
    "duplicates": (23, 7, 7, 5), "often": (23, 7, 7, 4),
}  # fmt: skip
"""All edges, structural ones, live under zero, live under resample."""


@pytest.fixture(scope="module", params=list(PLAIN))
def one(request: pytest.FixtureRequest) -> Compiled:
    return build(request.param)


def wanted(one: Compiled, words: tuple[str, ...]) -> np.ndarray:
    """The logits that the plain program asks for."""
    out = np.zeros((len(words), len(one.blueprint.vocabulary)))
    for at in range(len(words)):
        value = PLAIN[one.program.name](words, at)
        if isinstance(value, Fraction):
            out[at, one.blueprint.vocabulary.index("value")] = SCALE * float(value)
        elif value is not None:
            out[at, one.blueprint.vocabulary.index(str(value).lower())] = SCALE
    return out


def test_every_short_input_gives_what_the_program_says(one: Compiled) -> None:
    """The transformer in float64 and the plain arrays, on all inputs of one to four tokens, and as many as it may have."""
    assert set(PLAIN) == set(zoo.program_names())
    longest = [tuple(np.random.default_rng(0).choice(one.program.alphabet, one.program.longest)) for _ in range(8)]
    for inputs in (*(list(one.program.inputs(length)) for length in range(1, 5)), longest):
        tokens = torch.tensor(one.tokenizer([" ".join(words) for words in inputs])["input_ids"])
        known = np.stack([wanted(one, words) for words in inputs])
        with torch.no_grad():
            logits = one.hf(input_ids=tokens).logits[:, 1:].numpy()
        assert np.abs(logits - known).max() < EXACT
        assert np.abs(run(one.blueprint, tokens.numpy()).logits[:, 1:] - known).max() < EXACT


def test_the_three_truths_are_nested_and_as_many_as_published(one: Compiled) -> None:
    """Nested by brute force. The counts of reverse, xproportion, hist, sort_unique and pair_balance are those of Tracr's
    programs (docs/ground_truth.md says where shuffle_dyck's differ, and why)."""
    truth = one.truth
    assert truth.resample <= truth.zero <= truth.structural <= set(truth.edges)
    assert tuple(map(len, (truth.edges, truth.structural, truth.zero, truth.resample))) == COUNTS[one.program.name]


def test_what_ships_is_what_is_compiled(one: Compiled) -> None:
    state = load_file(zoo.path(one.program.name) / "model.safetensors")
    assert state.keys() == one.hf.state_dict().keys()
    assert all(torch.equal(value.double(), one.hf.state_dict()[key]) for key, value in state.items())


def test_canonical_sets() -> None:
    """Those that Miller et al. (2407.08734) name for Tracr's models, in this grammar of edges."""
    reverse, share = build("reverse").truth, build("xproportion").truth
    assert reverse.resample == {"embed>L3.kv0.v", "L3.h0>logits"}
    assert reverse.zero == reverse.resample | {
        "L2.mlp>L3.h0.q", "embed>L3.kv0.k", "L1.mlp>L2.mlp", "L0.mlp>L1.mlp", "embed>L1.mlp", "L0.h0>L0.mlp", "embed>L0.mlp",
        "embed>L0.kv0.v",
    }  # fmt: skip
    assert share.resample == {"embed>L0.mlp", "L0.mlp>L1.kv0.v", "L1.h0>logits"}
    assert share.zero == share.resample | {"embed>L1.h0.q", "embed>L1.kv0.k"}


@pytest.mark.parametrize("name", ["reverse", "hist"])
def test_shipped_folders_hold_what_is_compiled(name: str) -> None:
    loaded, made = Model.load(f"zoo/{name}"), build(name)
    assert loaded.dtype == torch.float64
    for key, value in made.hf.state_dict().items():
        assert torch.equal(loaded.hf.state_dict()[key], value), key
    assert loaded.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert examine(loaded).passed and "no look-ahead" not in str(examine(loaded))
    examples = load_task(f"zoo/{name}").examples(loaded.tokenizer, 16)
    values = loaded.run(examples.batch())[examples.batch().target_row, examples.batch().target_position]
    assert (values.argmax(-1) == examples.batch().answers[:, 0]).all()


def test_answers_are_read_where_the_pair_says(one: Compiled) -> None:
    """A target per span that is read, right and wrong as the plain program has them on the clean and the corrupt input."""
    if one.program.output.numerical:
        return  # `value` against `nothing` everywhere
    examples = one.task.examples(one.tokenizer, 4)
    batch = examples.batch()
    assert len(batch.target_row) == sum(len(example.read) for example in examples)
    for row, column, right, wrong in zip(
        batch.target_row, batch.target_position, batch.answers[:, 0], batch.wrong[:, 0], strict=True
    ):
        example = examples[int(row)]
        at = int(column) - (batch.tokens.shape[1] - len(example.clean))
        for text, token in ((example.pair.clean, right), (example.pair.corrupt, wrong)):
            value = PLAIN[one.program.name](tuple(str(text).split()), at - 1)
            assert one.blueprint.vocabulary[int(token)] == ("nothing" if value is None else str(value).lower())


def test_spans_that_are_read_are_checked() -> None:
    with pytest.raises(TaskError, match="'read' names 'p2'"):
        Pair("a b", [" a"], "b a", [" b"], {"p0": (0, 1)}, read=["p2"])
    with pytest.raises(TaskError, match="1 spans are read, and 2 are given as 'answer'"):
        Pair("a b", [" a", " b"], "b a", [" b"], {"p0": (0, 1)}, read=["p0"])
    assert not Pair("a b", [" a"], "b a", [" b"], {"p0": (0, 1)}, read=["p0"]).invertible


def test_unknown_programs_are_refused() -> None:
    with pytest.raises(ModelError, match="no compiled program 'sort': choose from reverse"):
        zoo.program("sort")
    with pytest.raises(ModelError, match="no compiled program 'small'"):
        load_task("zoo/small")
    with pytest.raises(TaskError, match="no option"):
        load_task("zoo/hist", width=3)


def test_brackets_with_one_map_for_two_have_the_edges_that_tracr_counts() -> None:
    """Tracr makes one map of a map of a map; then nothing leads from the third MLP to the fourth. On 7 random brackets, which are
    never balanced, 14 edges are live under zero, with one map or with two."""
    balance, every = programs.pair_balance(), programs.select(INDICES, INDICES, lambda key, query: True)
    anywhere = programs.aggregated(every, programs.mapped(lambda x: x < 0, balance, numerical=True))
    last = programs.select(INDICES, programs.mapped(lambda n: n - 1, programs.length()), lambda key, query: key == query)
    closed = programs.aggregated(last, programs.mapped(lambda x: x == 0, balance))
    output = programs.zipped(lambda a, b: a and b, closed, programs.mapped(lambda share: share == 0, anywhere))
    two = programs.PROGRAMS["shuffle_dyck"]
    for program, structural in ((replace(two, output=output), 29), (two, 30)):
        blueprint = compile_program(program)
        ids = [blueprint.vocabulary.index(word) for word in ("<bos>", "(", ")")]
        drawn = np.random.default_rng(0).choice(ids[1:], (2, 16, 7))
        clean, corrupt = (np.hstack([np.full((16, 1), ids[0]), rows]) for rows in drawn)
        found = truth_of(blueprint, clean, corrupt)
        assert (len(found.structural), len(found.zero), len(found.resample)) == (structural, 14, 4)
