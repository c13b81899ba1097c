"""Task: where pairs come from, and how they become examples in a tokenizer."""

import hashlib
import inspect
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from patchclamp.errors import AlignmentError, TaskError
from patchclamp.tasks._chat import Chat
from patchclamp.tasks._encode import Encoder
from patchclamp.tasks._examples import Example, Examples
from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._preview import shown
from patchclamp.tasks._split import Split, deal
from patchclamp.tasks._tokens import Misfit, Tokenizer

DEFAULT_N = 256  # 128 to fit, 64 to select, 64 to confirm
PATIENCE = 1000  # candidates in a row that bring nothing new, after which a source is taken to be dry

Candidates = Callable[[random.Random, Tokenizer], Iterator[Pair]]


@dataclass(frozen=True)
class Task:
    """A behaviour, written down as prompts.

    Args:
        name: what it is called.
        about: one sentence: what it tests.
        candidates: (random generator, tokenizer) -> pairs; those that do not fit the tokenizer are dropped and counted.
        metric: name of the metric that gives one number per example.
        single: whether answers must be single tokens.
        size: how many pairs there are, where that is a fixed number; None where they are drawn.
        bos: None: special tokens as the tokenizer does; True: exactly one BOS; False: none.
        chat: how messages are rendered, and whether text prompts become chats.
        window: tokens in a window of plain text.
        options: what the task was built with.
        source: hash of what it was built from; by default, of the file that holds `candidates`.
    """

    name: str
    about: str
    candidates: Candidates
    metric: str = "logit_diff"
    single: bool = False
    size: int | None = None
    bos: bool | None = None
    chat: Chat = field(default_factory=Chat)
    window: int = 128
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    source: str = ""

    def __post_init__(self) -> None:
        if not self.source:
            object.__setattr__(self, "source", _digest(self.candidates))

    @property
    def hash(self) -> str:
        """SHA-256 of the task's content: its rows or source file, and every option that changes examples."""
        chat = [self.chat.wrap, self.chat.system, dict(self.chat.arguments)]
        parts = [self.name, self.source, self.metric, self.single, self.bos, chat, self.window, dict(self.options)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def encoder(self, tokenizer: Tokenizer) -> Encoder:
        """This task's rules with a tokenizer."""
        return Encoder(tokenizer, self.bos, self.chat, self.window, self.single)

    def examples(self, tokenizer: Tokenizer, n: int | None = None, seed: int = 0) -> Examples:
        """Draw pairs until `n` fit the tokenizer; the same seed gives the same examples.

        Args:
            tokenizer: of the model that is looked at.
            n: how many; by default all rows of a file, and 256 of a task that draws.
            seed: of the draw. Rows of a file keep their order where all are taken.

        Raises:
            TaskError: too few fit; says how many there are, how many were needed, why and on which words the rest failed.
            AlignmentError: none fits, because clean and corrupt prompts do not align.
        """
        if n is not None and n < 1:
            raise TaskError(f"{n} examples of {self.name!r} were asked for: give at least 1")
        if n is None and self.size is None:
            n = DEFAULT_N
        pairs = self.candidates(random.Random(seed), tokenizer)
        drawn = _draw(self.encoder(tokenizer), _shuffled(pairs, seed) if n is not None and self.size is not None else pairs, n)
        if not drawn.items or (n is not None and len(drawn.items) < n):
            raise drawn.too_few(self.name, n or 1)
        items = tuple(drawn.items[:n])
        return Examples(items, tokenizer, self.name, self.metric, dict(drawn.dropped), tuple(drawn.failed))

    def split(self, tokenizer: Tokenizer, n: int | None = None, seed: int = 0) -> Split:
        """Three disjoint sets, fit : select : confirm = 2 : 1 : 1, of `n` examples together.

        No prompt (clean or corrupt), no mirror and no named group of one set occurs in another.

        Raises:
            TaskError: there are too few pairs, or they hang together too much to be parted; says how many.
        """
        return deal(self.examples(tokenizer, n, seed), seed)

    def preview(self, tokenizer: Tokenizer, k: int = 5, seed: int = 0) -> str:
        """`k` examples to be read, as the tokens that the model sees (`|` between them), with their spans and answers."""
        few = self.size is not None and self.size <= k
        return shown(self.examples(tokenizer, None if few else k, seed), k)


@dataclass
class _Drawn:
    """What came of the candidates so far."""

    items: list[Example] = field(default_factory=list[Example])
    dropped: Counter[str] = field(default_factory=Counter[str])
    failed: dict[str, None] = field(default_factory=dict[str, None])
    misaligned: int = 0

    def too_few(self, name: str, wanted: int) -> TaskError:
        """The error that says how many there are, how many were needed, why the rest was dropped and on which words."""
        kind = AlignmentError if not self.items and self.misaligned * 2 > self.dropped.total() else TaskError
        reasons = "; ".join(f"{count} dropped: {reason}" for reason, count in self.dropped.most_common())
        words = ", ".join(repr(word) for word in list(self.failed)[:12]) + (" ..." if len(self.failed) > 12 else "")
        text = f"{name!r} has {len(self.items)} examples that fit this tokenizer, and {wanted} are needed"
        text += f" ({reasons})" if reasons else " (there are no more)"
        return kind(f"{text}; what failed: {words}" if words else text)


def _draw(encoder: Encoder, pairs: Iterable[Pair], n: int | None) -> _Drawn:
    """Encode pairs until `n` different examples fit, the pairs end, or nothing new has come for long."""
    drawn, seen, idle = _Drawn(), set[object](), 0
    for pair in pairs:
        idle += 1
        if (n is not None and len(drawn.items) >= n) or idle > PATIENCE:
            break
        try:
            found = encoder(pair)
        except Misfit as misfit:
            drawn.dropped[misfit.reason] += 1
            drawn.misaligned += misfit.alignment
            drawn.failed.update(dict.fromkeys(misfit.words))
            continue
        new = [example for example in found if example.key not in seen]
        if len(new) < len(found):
            drawn.dropped["drawn before"] += len(found) - len(new)
        if new:
            idle = 0
        seen.update(example.key for example in new)
        drawn.items.extend(new)
    return drawn


def _shuffled(pairs: Iterable[Pair], seed: int) -> list[Pair]:
    """All pairs, in an order that the seed sets."""
    found = list(pairs)
    random.Random(seed).shuffle(found)
    return found


def _digest(candidates: Candidates) -> str:
    """SHA-256 of the source file that holds a function, or of its code where there is no file."""
    function = inspect.unwrap(candidates.func if isinstance(candidates, partial) else candidates)
    try:
        content = Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        content = repr((code.co_code, code.co_consts) if code else function).encode()
    return hashlib.sha256(content).hexdigest()
