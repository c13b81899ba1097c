"""Reading tasks that users wrote down."""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pandas
import polars as pl
import pytest

from patchclamp.errors import TaskError
from patchclamp.tasks import Message, Pair, Task, load_task
from small_tokenizers import words

ROWS: list[dict[str, Any]] = [
    {"clean": "one two", "corrupt": "one four", "answer": " three", "wrong": " five"},
    {"clean": "two two", "corrupt": "two four", "answer": " three", "wrong": " five"},
    {"clean": "six two", "corrupt": "six four", "answer": " three", "wrong": " five"},
]
WORDS = words(["one two three four five six"])


def pairs(task: Task) -> list[Pair]:
    return [one.pair for one in task.examples(WORDS)]


EXPECTED = [Pair(row["clean"], row["answer"], row["corrupt"], row["wrong"]) for row in ROWS]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows as a file of the path's kind."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        pl.DataFrame(rows).write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_files_of_rows(tmp_path: Path, suffix: str) -> None:
    """Every kind of file gives the same pairs, blanks kept; name and metric follow from it."""
    task = load_task(str(write(tmp_path / f"mine{suffix}")))
    assert pairs(task) == EXPECTED
    assert (task.name, task.metric, task.size) == ("mine", "logit_diff", 3)


def test_rows_and_frames() -> None:
    """A list of mappings, a Hugging Face dataset, a polars and a pandas frame."""
    import datasets  # type: ignore[import-untyped]

    for rows in (ROWS, datasets.Dataset.from_list(ROWS), pl.DataFrame(ROWS), pandas.DataFrame(ROWS)):
        assert pairs(load_task(rows)) == EXPECTED


def test_columns_are_named(tmp_path: Path) -> None:
    """Our name for theirs; one that is not there, or is no field, is named."""
    rows = [{"good": row["clean"], "bad": row["corrupt"], "right": row["answer"], "wrong": row["wrong"], "id": 7} for row in ROWS]
    columns = {"clean": "good", "corrupt": "bad", "answer": "right"}
    assert pairs(load_task(rows, columns=columns)) == EXPECTED
    assert pairs(load_task(str(write(tmp_path / "x.csv", rows)), columns=columns)) == EXPECTED
    with pytest.raises(TaskError, match="row 1 has no column 'best': there are good, bad, right, wrong, id"):
        load_task(rows, columns={"clean": "best"})
    with pytest.raises(TaskError, match="columns name 'prompt', which is no field of a task: choose from clean, text"):
        load_task(rows, columns={"prompt": "good"})
    with pytest.raises(TaskError, match="'ioi' is a program, not a table"):
        load_task("ioi", columns=columns)


def test_what_is_optional() -> None:
    """No corrupt and no wrong: the metric is nll. Lists, spans, groups, token ids and messages are read."""
    (one,) = pairs(load_task([{"clean": "one two", "answer": [" three", " four"], "spans": {"x": [4, 7]}, "group": 3}]))
    assert one == Pair("one two", (" three", " four"), spans={"x": (4, 7)}, group="3")
    task = load_task(
        [
            {"clean": [2, 3], "answer": 4, "corrupt": [2, 5], "wrong": [[4, 5]]},
            {"clean": [3, 3], "answer": [4], "corrupt": [4, 3], "wrong": 5},
        ]
    )
    assert [one.pair.answer for one in task.examples(WORDS)] == [((4,),), ((4,),)]
    assert load_task([{"clean": "one", "answer": " two"}]).metric == "nll"
    chat = load_task([{"clean": [{"role": "user", "content": "one"}], "answer": " two"}])
    assert next(chat.candidates(Random(0), WORDS)).clean == (Message("user", "one"),)


def test_mirrors_can_be_denied(tmp_path: Path) -> None:
    """`wrong` is taken to be right after `corrupt`, unless the user says no: for all rows, or in a row."""
    assert len(load_task(ROWS).examples(WORDS).mirrored()) == 6
    for task in (
        load_task(str(write(tmp_path / "x.jsonl")), mirrors="false"),
        load_task([{**row, "mirrors": False} for row in ROWS]),
    ):
        with pytest.raises(TaskError, match="cannot be mirrored"):
            task.examples(WORDS).mirrored()


def test_plain_text(tmp_path: Path) -> None:
    """A .txt is one text; rows of `text` may mark targets."""
    path = tmp_path / "book.txt"
    path.write_text("one two three four five six " * 5)
    task = load_task(str(path), window=7)
    examples = task.examples(WORDS)
    assert task.metric == "nll" and all(len(one.clean) <= 7 for one in examples)
    (one,) = load_task([{"text": "one two three", "targets": [[4, 7]]}]).examples(WORDS)
    assert [WORDS.decode([one.clean[t]]) for t in one.targets] == [" two"]


def test_content_makes_the_hash(tmp_path: Path) -> None:
    """The file's bytes, not its place; columns count too."""
    one, two = write(tmp_path / "mine.jsonl"), tmp_path / "sub" / "mine.jsonl"
    two.parent.mkdir()
    two.write_bytes(one.read_bytes())
    assert load_task(one).hash == load_task(two).hash
    two.write_text(two.read_text().replace("six", "one"))
    assert load_task(one).hash != load_task(two).hash
    assert load_task(one).hash != load_task(one, mirrors=False).hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"clean": "a", "answer": "b"}\n{"clean": "a",\n', r"bad.jsonl, line 2 is not JSON: .* at column 1[45]"),
        ('\n\n["a"]', "bad.jsonl, line 3 is no JSON object but list: a row has clean, text, corrupt"),
        ('{"clean": "a"}', r"bad.jsonl, line 1: there is no 'answer' \(plain text is called 'text'\)"),
        ('{"anser": "a", "clean": "b"}', "line 1 has a field 'anser': is 'answer' meant"),
        ('{"answer": "a"}', "line 1: there is no 'clean'"),
        ('{"clean": 5, "answer": "b"}', "line 1: 'clean' must be text, a list of token ids or a list of messages, not 5"),
        ('{"clean": "", "answer": "b"}', "line 1: 'clean' is empty"),
        ('{"clean": "a", "answer": ["b", 1.5]}', "line 1: 'answer' holds 1.5: an alternative is text or token ids"),
        ('{"clean": "a", "answer": ""}', "line 1: 'answer' holds \"\""),
        ('{"clean": "a", "answer": "b", "spans": {"S": [3]}}', r"line 1: span 'S' must be \[start, end\]"),
        ('{"clean": "a", "answer": "b", "spans": [1, 2]}', r"line 1: 'spans' must map names"),
        (
            '{"clean": [{"role": "user"}], "answer": "b"}',
            "line 1: 'clean' holds the message .*: a message has 'role' and 'content'",
        ),
        ('{"text": "a", "answer": "b"}', "line 1: 'text' is plain text and stands alone, and 'answer' is given"),
        ('{"text": "a", "targets": 3}', "line 1: 'targets' must be a list"),
        (
            '{"clean": "a", "answer": "b", "wrong": "c"}\n{"clean": "a", "answer": "b"}',
            "line 2 of 'bad' has no 'wrong', and others have",
        ),
        ("", "the task 'bad' is empty: it has no rows"),
        ("\xff\xfe", "bad.jsonl is not UTF-8 text"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    """One message, with the line."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(TaskError, match=message):
        load_task(str(path))


def test_files_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    """The path is named."""
    with pytest.raises(TaskError, match=r"the task file '.*none.jsonl' cannot be read: No such file"):
        load_task(str(tmp_path / "none.jsonl"))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(TaskError, match=r"x.parquet cannot be read"):
        load_task(str(tmp_path / "x.parquet"))
    (tmp_path / "x.json").write_text('{"clean": 1}')
    with pytest.raises(TaskError, match="must be a list of JSON objects"):
        load_task(str(tmp_path / "x.json"))
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(TaskError, match="'x' is empty"):
        load_task(str(tmp_path / "x.txt"))
    with pytest.raises(TaskError, match="a task is a name, a path, rows or a data frame, not int"):
        load_task(3)
    with pytest.raises(TaskError, match="row 1 is no mapping but str"):
        load_task(["a"])
    with pytest.raises(TaskError, match=r"'x.jsonl' has no option 'shots': there are mirrors=True"):
        load_task(str(write(tmp_path / "x.jsonl")), shots=3)


FACTORY = '''
"""A task of the user's own."""
from dataclasses import dataclass
from patchclamp.tasks import Pair, Task

@dataclass(frozen=True)
class Row:
    word: str

def task(*, word: str = "three", times: int = 1) -> Task:
    rows = [Row(word)] * times
    pairs = [Pair("one two", f" {row.word}") for row in rows]
    return Task("own", "my own", lambda _rng, _tokenizer: iter(pairs), metric="nll", size=times)

def other() -> Task:
    return task(word="five")
'''


def test_python_files_and_dotted_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory with options, in a file or by a dotted name; another attribute after a colon; a TASK."""
    path = tmp_path / "own_task.py"
    path.write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    for source in (str(path), "own_task:task"):
        (one,) = load_task(source, word="four").examples(WORDS)
        assert one.answers == (tuple(WORDS([" four"])["input_ids"][0]),)
    assert [one.pair.answer for one in load_task("own_task:other").examples(WORDS)] == [(" five",)]
    assert load_task(str(path)).hash == load_task(str(path)).hash
    before = load_task(str(path)).hash
    path.write_text(FACTORY + "\n# changed\n")
    assert load_task(str(path)).hash != before
    with pytest.raises(TaskError, match="'own_task' has no option 'w': there are word=three, times=1"):
        load_task(str(path), w="a")
    (tmp_path / "fixed.py").write_text(
        "from patchclamp.tasks import load_task\nTASK = load_task([{'clean': 'one', 'answer': ' two'}])"
    )
    assert load_task(str(tmp_path / "fixed.py")).name == "rows"
    with pytest.raises(TaskError, match="the task 'fixed' has no options, and x was given"):
        load_task(str(tmp_path / "fixed.py"), x=1)
    sys.modules.pop("own_task", None)


def test_python_files_that_fail(tmp_path: Path) -> None:
    """What the user's code raised is in the message; so is a file without a task."""
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(TaskError, match="fails when run: ZeroDivisionError: division by zero"):
        load_task(str(tmp_path / "broken.py"))
    (tmp_path / "nothing.py").write_text("x = 1")
    with pytest.raises(TaskError, match="'nothing' holds no task: give it TASK, or a function task"):
        load_task(str(tmp_path / "nothing.py"))
    with pytest.raises(TaskError, match="there is no task file"):
        load_task(str(tmp_path / "none.py"))
    with pytest.raises(TaskError, match=r"the task module 'no.such.module' cannot be imported: ModuleNotFoundError"):
        load_task("no.such.module")


def test_shared_files_load(shared: Path) -> None:
    """The story behaviours, by line."""
    columns = {"clean": "sentence_good", "corrupt": "sentence_bad", "answer": "field"}
    with pytest.raises(TaskError, match=r"blimp.tsv, row 1 has no column 'field': there are UID, linguistics_term"):
        load_task(shared / "data" / "blimp" / "blimp.tsv", columns=columns)
    folder = shared / "data" / "story-behaviours"
    sizes = {path.stem: load_task(path).size for path in sorted(folder.glob("*.jsonl"))}
    assert sizes == {"stories260k-name-recall": 720, "stories260k-pronoun": 400, "tinystories-656k-name-recall": 132}
