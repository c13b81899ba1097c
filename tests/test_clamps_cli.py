"""`patchclamp clamp`: clamps read from text, runs, tables, and what is refused before anything is trained."""

import json
from pathlib import Path

import pytest

from patchclamp.errors import TrainingError
from patchclamp.training.clamps import Ablate, Copy, Forbid, Force, Freeze, Preserve, Schedule
from patchclamp.training.clamps.read import FORMS, read

TINY = ["--steps", 8, "--batch", 2, "--every", 1, "--seeds", 3]


def test_clamps_are_read_from_text():
    on = Schedule(2, 9, 0.5)
    for kind, text, wanted in [
        ("force", "L0.h0.pattern=previous", Force("L0.h0.pattern", "previous", on)),
        ("forbid", "L0.h*.pattern = first", Forbid("L0.h*.pattern", "first", on)),
        ("ablate", "L1.h2", Ablate("L1.h2", "zero", on)),
        ("ablate", "L1.h2=mean", Ablate("L1.h2", "mean", on)),
        ("copy", "L1.h0.pattern", Copy("L1.h0.pattern", schedule=on)),
        ("freeze", "L0.h0", Freeze("L0.h0", on)),
        ("preserve", "L0.h0.pattern=itself", Preserve("L0.h0.pattern", None, on)),
    ]:
        assert repr(read(kind, text, on)) == repr(wanted)


@pytest.mark.parametrize("kind", FORMS)
def test_what_does_not_read_is_refused_with_the_form(kind: str):
    for text in ("", "=", "L0.h0=", "=previous"):
        with pytest.raises(TrainingError, match=r"does not read: give|no checkpoint"):
            read(kind, text)


def test_a_comparison_from_the_command_line(cli, tmp_path: Path):
    """Eight steps of the zoo's induction recipe on three seeds: too few for a phase change, which is said."""
    words = ["clamp", "induction", "--out", tmp_path / "runs", *TINY, "--force", "L0.h0.pattern=previous", "--ablate", "L1.h2"]
    code, out, err = cli(*words, "--each", "--count", "repeated", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [arm["arm"] for arm in told["arms"]] == ["force-L0.h0.pattern-previous", "ablate-L1.h2"]
    assert len(told["runs"]) == 9 and {row["seed"] for row in told["runs"]} == {0, 1, 2}
    assert (tmp_path / "runs/unclamped/seed-0/metrics.parquet").is_file() and (tmp_path / "runs/table.parquet").is_file()
    code, out, _ = cli(*words, "--each", "--count", "repeated")
    assert code == 0 and "too few" in out and "Intervals at 95%" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing was clamped"),
        (["--force", "L0.h0.pattern=next"], "choose previous"),
        (["--force", "L0.h0.pattern"], "does not read"),
        (["--force", "L0.h0=previous"], "no attention pattern"),
        (["--force", "L9.h0.pattern=previous"], "no L9.h0.pattern"),
        (["--freeze", "L0.h9"], "no L0.h9"),
        (["--ablate", "L0.h0", "--from", 5, "--to", 5], "end after"),
        (["--ablate", "L0.h0", "--ramp", "up"], "needs the step"),
        (["--ablate", "L0.h0", "--seeds", "some"], "how many"),
        (["--ablate", "L0.h0", "--seeds", "1,1"], "seeds that differ"),
        (["--ablate", "L0.h0", "--count", "few"], "all or repeated"),
        (["--preserve", "L0.h0=nowhere"], "no checkpoint"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(cli, words: list, said: str, tmp_path: Path):
    code, _, err = cli("clamp", "induction", "--out", tmp_path / "runs", *TINY, *words)
    assert code == 2 and said in err and not (tmp_path / "runs").exists()


def test_what_is_no_recipe_needs_data(cli, tmp_path: Path):
    code, _, err = cli("clamp", "nothing", "--out", tmp_path / "runs", "--ablate", "L0.h0")
    assert code == 2 and "no recipe" in err and "induction" in err


def test_texts_and_a_configuration(cli, tmp_path: Path, request: pytest.FixtureRequest):
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "texts.txt").write_text("The cat sat on the mat, and the dog lay on the log. " * 60)
    words = ["clamp", tmp_path / "config.json", "--data", tmp_path / "texts.txt", "--tokenizer", "zoo/small", "--length", 12,
             "--out", tmp_path / "runs", "--ablate", "L0.h0", "--json"]  # fmt: skip
    code, out, err = cli(*words, "--steps", 8, "--batch", 2, "--every", 1, "--seeds", "1")
    assert code == 0, err
    assert json.loads(out)["arms"][0]["verdict"] == "too few"
