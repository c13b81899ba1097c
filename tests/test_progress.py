"""Progress: what is left by the work that is left; what ends early, what was kept, what nobody watches."""

import io

import pytest
from rich.console import Console

from patchclamp.cli.progress import Bars, Whole, bars, duration

PIECES = [("exact", "exact effects", 10.0), ("roles", "G", 20.0), ("roles", "G+ and G-", 40.0), ("roles", "judging", 10.0),
          ("trust", "random circuits", 20.0)]  # fmt: skip


def test_the_whole_is_the_sum_of_its_pieces():
    whole = Whole(PIECES)
    assert whole.total == 100 and whole.left(5.0) is None
    whole.begin("exact")
    whole.progress("exact effects", 8, 16)
    assert whole.done == 5 and whole.left(5.0) == pytest.approx(95)
    whole.end("exact", kept=False)
    assert (whole.done, whole.total) == (5, 95)  # half of it was never told, so never run
    whole.begin("roles")
    whole.progress("something else", 1, 2)  # nobody has counted it
    before = whole.total
    whole.progress("G", 24, 24)
    whole.progress("G+ and G-", 15, 30)
    whole.end("roles", kept=False)
    assert whole.total == before - 20  # the second half of G+ and G- was never needed
    whole.end("trust", kept=False)
    assert whole.done == whole.total and whole.left(9.0) == 0


def test_what_stands_still_leaves_the_whole():
    """Half of G is done when it stands still: the other half is neither done nor left."""
    whole = Whole(PIECES)
    whole.end("exact", kept=False)
    whole.begin("roles")
    whole.progress("G", 12, 24)
    assert (whole.done, whole.total) == (20, 100)
    whole.progress("G+ and G-", 3, 30)
    assert (whole.done, whole.total) == (24, 90)
    assert whole.left(12.0) == pytest.approx(12 * 66 / 24)


def test_what_was_kept_is_no_work():
    whole = Whole(PIECES)
    whole.end("exact", kept=True)
    whole.end("roles", kept=True)
    assert (whole.done, whole.total) == (0, 20) and whole.left(3.0) is None
    whole.begin("trust")
    whole.progress("random circuits", 1, 4)
    assert whole.left(2.0) == pytest.approx(6)


def run(shown: Bars) -> None:
    shown.step("exact", "begin", 0.0)
    for done in range(17):
        shown.progress("exact effects", done, 16)
    shown.step("exact", "done", 12.0)
    shown.step("roles", "kept", 250.0)
    shown.step("prompts", "done", 0.1)


def test_a_terminal_sees_what_is_left_and_a_file_does_not():
    seen, written = io.StringIO(), io.StringIO()
    for file, terminal in ((seen, True), (written, False)):
        with bars(Console(file=file, force_terminal=terminal, width=120), PIECES) as shown:
            run(shown)
            if terminal:
                shown.bars.refresh()
    assert "in all" in seen.getvalue() and "left" in seen.getvalue()
    assert [line.split() for line in written.getvalue().splitlines()] == [
        ["exact", "12", "s"],
        ["roles", "kept", "from", "before"],
    ]


def test_without_pieces_there_is_no_whole():
    seen = io.StringIO()
    with bars(Console(file=seen, force_terminal=True, width=120)) as shown:
        run(shown)
        assert shown.all is None
    assert "in all" not in seen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99.4, "99 s"), (99.6, "1 min 40 s"), (200, "3 min 20 s"), (5999, "99 min 59 s"),
     (18600, "5 h 10 min")],
)  # fmt: skip
def test_durations(seconds: float | int, text: str):
    assert duration(seconds) == text
