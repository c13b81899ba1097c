"""Progress on standard error: what is running, how far the whole is, how long it still takes. Gone when it is done."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

QUIET = ("prompts", "patterns-all", "patterns-none")
"""Steps too short for a line of their own."""


def duration(seconds: float | int) -> str:
    """Seconds for people: "0.4 s", "42 s", "3 min 20 s", "5 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Piece:
    """A piece of the whole: its step, what progress calls it, its share of the work, and what is done of that."""

    step: str
    title: str
    weight: float
    done: float = 0.0


class Whole:
    """How far a job of several pieces is, when steps are told as they begin and end, and pieces as they go on.

    What ends before it was expected to (a descent that stands still) was less work: it leaves the whole, and does not count as
    done. So the rate at which work is done stays true, and with it the time that is left.
    """

    def __init__(self, pieces: Sequence[tuple[str, str, float]]) -> None:
        self.pieces = [Piece(*piece) for piece in pieces if piece[2] > 0]
        self.step = ""

    @property
    def done(self) -> float:
        """Of `total`."""
        return sum(piece.done for piece in self.pieces)

    @property
    def total(self) -> float:
        """All work that is still believed in."""
        return sum(piece.weight for piece in self.pieces)

    def begin(self, step: str) -> None:
        """A step begins."""
        self.step = step

    def progress(self, title: str, done: int, of: int) -> None:
        """Something of the step is so far; what comes before it in the step has ended."""
        mine = [piece for piece in self.pieces if piece.step == self.step]
        names = [piece.title for piece in mine]
        if title not in names:
            return
        for piece in mine[: names.index(title)]:
            _end(piece)
        piece = mine[names.index(title)]
        piece.done = piece.weight * done / max(1, of)

    def end(self, step: str, kept: bool) -> None:
        """A step is done; kept from before, it was no work."""
        for piece in self.pieces:
            if piece.step == step:
                piece.weight = 0.0 if kept else piece.weight
                _end(piece)

    def left(self, elapsed: float) -> float | None:
        """Seconds that are left after `elapsed`, at the rate so far; None before anything is done."""
        return elapsed * (self.total - self.done) / self.done if self.done > 0 and elapsed > 0 else None


def _end(piece: Piece) -> None:
    """What was told in part ends where it is; what was never told (it has no progress of its own) is done."""
    piece.weight = piece.done = piece.done if piece.done > 0 else piece.weight


class Amount(ProgressColumn):
    """How much is done: a count, or of the whole a share."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        if task.fields.get("whole"):
            return Text(f"{task.completed / max(task.total, 1e-9):.0%}")
        return Text(f"{task.completed:.0f}/{task.total:.0f}")


class Left(ProgressColumn):
    """How long it still takes, at the rate so far; nothing before there is one."""

    def render(self, task: Task) -> Text:
        whole: Whole | None = task.fields.get("whole")
        elapsed, left = task.elapsed or 0.0, None
        if whole is not None:
            left = whole.left(elapsed)
        elif task.total is not None and task.completed > 0:
            left = elapsed * (task.total - task.completed) / task.completed
        return Text("" if left is None else f"{'about ' if whole else 'at most '}{duration(left)} left", style="cyan")


class Bars:
    """One line per finished step, one bar for what is running, and one for the whole where its pieces are known."""

    def __init__(self, bars: Progress, pieces: Sequence[tuple[str, str, float]] = ()) -> None:
        self.bars, self.what = bars, ""
        self.task: TaskID | None = None
        self.whole = Whole(pieces)
        self.all = bars.add_task("in all", total=self.whole.total, whole=self.whole) if self.whole.pieces else None

    def step(self, name: str, event: str, seconds: float) -> None:
        """A step began, was done, or was kept from before."""
        if event == "begin":
            self.whole.begin(name)
            self._show(name, None, None)
        else:
            self.whole.end(name, kept=event == "kept")
            if name not in QUIET:
                note = "kept from before" if event == "kept" else duration(seconds)
                self.bars.console.print(Text(f"  {name:<16} {note}", style="dim"))
        self._count()

    def progress(self, what: str, done: int, of: int) -> None:
        """Something is so far."""
        self.whole.progress(what, done, of)
        self._show(what, done, of)
        self._count()

    def _show(self, what: str, done: int | None, of: int | None) -> None:
        if self.task is None or what != self.what:
            if self.task is not None:
                self.bars.remove_task(self.task)
            self.task, self.what = self.bars.add_task(what, total=of), what
        self.bars.update(self.task, completed=done or 0, total=of)

    def _count(self) -> None:
        if self.all is not None:
            self.bars.update(self.all, completed=self.whole.done, total=self.whole.total)


@contextmanager
def bars(console: Console, pieces: Sequence[tuple[str, str, float]] = ()) -> Generator[Bars]:
    """Progress, gone when it is done; where nobody watches, only the lines of finished steps.

    Args:
        console: where to.
        pieces: by piece of the whole, its step, what progress calls it, and its work.
    """
    columns = (TextColumn("  {task.description}"), BarColumn(24), Amount(), TimeElapsedColumn(), Left())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bars(progress, pieces)
