"""Examples: tokenised pairs, ready to become batches."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Pair, Range, Tokens
from patchclamp.tasks._tokens import Tokenizer

if TYPE_CHECKING:
    from patchclamp.tasks._batch import Batch


@dataclass(frozen=True)
class Example:
    """A pair in a tokenizer's ids.

    `answers` and `wrong` hold alternatives, each a tuple of token ids; several alternatives are single tokens. Spans are
    half-open token ranges in `clean` (and, since they align, in `corrupt`); `end` is the last prompt token. In plain text
    `targets` are the positions whose token is to be predicted from what precedes it. Where `read` names spans, `answers` and
    `wrong` hold one token for each of them, right or wrong at the span's last token.
    """

    clean: Tokens
    answers: tuple[Tokens, ...]
    pair: Pair
    corrupt: Tokens | None = None
    wrong: tuple[Tokens, ...] = ()
    spans: Mapping[str, Range] = field(default_factory=dict[str, Range])
    targets: Tokens = ()
    group: str = ""
    read: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two examples the same."""
        return self.clean, self.corrupt, self.answers, self.wrong, self.targets, self.read

    def mirror(self) -> "Example":
        """The example in the other direction: clean and corrupt, right and wrong exchanged."""
        pair = self.pair.mirror()
        assert self.corrupt is not None  # or the pair would not have been invertible
        return replace(self, clean=self.corrupt, corrupt=self.clean, answers=self.wrong, wrong=self.answers, pair=pair)


@dataclass(frozen=True, eq=False)
class Examples:
    """A frozen sequence of examples of one task in one tokenizer.

    Args:
        items: the examples; all have a corrupt prompt or none, all have wrong answers or none.
        tokenizer: decodes what is shown.
        task: name of the task.
        metric: name of the task's metric.
        dropped: reason -> how many candidates did not fit.
        failed: the words they failed on.
        pad: token id that fills up on the left, under the mask.

    Raises:
        TaskError: examples of different forms are mixed.
    """

    items: tuple[Example, ...]
    tokenizer: Tokenizer = field(repr=False)
    task: str = ""
    metric: str = "logit_diff"
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    failed: tuple[str, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        for name in ("corrupt", "wrong", "targets", "read"):
            have = sum(bool(getattr(item, name)) for item in self.items)
            if 0 < have < len(self.items):
                raise TaskError(f"{have} of {len(self.items)} examples of {self.task!r} have {name!r}: all must have it, or none")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        pairs = " pairs" if self.items and self.items[0].corrupt is not None else " prompts"
        return f"Examples({len(self)}{pairs} of {self.task!r}, metric {self.metric}, {sum(self.dropped.values())} dropped)"

    def __iter__(self) -> Iterator[Example]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]

    def take(self, indices: Iterable[int]) -> "Examples":
        """The examples at `indices`, in that order."""
        return replace(self, items=tuple(self.items[i] for i in indices))

    def batch(self, indices: Iterable[int] | None = None) -> "Batch":
        """Rows of tokens for the examples at `indices` (all by default), in that order.

        Raises:
            TaskError: there is nothing to put into a batch.
        """
        from patchclamp.tasks._rows import make_batch  # torch is loaded here, so that listing tasks stays quick

        chosen = self.items if indices is None else self.take(indices).items
        if not chosen:
            raise TaskError(f"a batch of no examples was asked of {self.task!r}, which has {len(self)}")
        return replace(make_batch(chosen, self.pad), metric=self.metric)

    def batches(self, size: int) -> Iterator["Batch"]:
        """Batches of `size` examples in order; the last may be smaller."""
        if size < 1:
            raise TaskError(f"batches of {size} examples were asked for: give at least 1")
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))

    @property
    def majority(self) -> float:
        """Share of the most frequent answer: what a model scores that says one thing always.

        In plain text, the share of the most frequent token among the targets.
        """
        counts: Counter[object] = Counter()
        for item in self.items:
            counts.update([item.answers] if item.answers else [item.clean[at] for at in item.targets])
        return max(counts.values()) / counts.total() if counts else 0.0

    def mirrored(self) -> "Examples":
        """These examples and each one's mirror (clean and corrupt, right and wrong exchanged), without repeats.

        Raises:
            TaskError: a pair has no mirror.
        """
        both = {item.key: item for one in self.items for item in (one, one.mirror())}
        return replace(self, items=tuple(both.values()))

    def shuffled_answers(self, seed: int) -> "Examples":
        """The same prompts with (answers, wrong) permuted at random over examples whose answers have the same lengths.

        What a learned gate still finds on these is what it finds in noise.

        Raises:
            TaskError: plain text has no answers to shuffle.
        """
        if any(not item.answers for item in self.items):
            raise TaskError(f"{self.task!r} is plain text: its targets are its own tokens, so no answers can be shuffled")
        rng = random.Random(seed)
        alike: dict[object, list[int]] = {}
        for i, item in enumerate(self.items):
            lengths = len(item.answers[0]), len(item.wrong[0]) if item.wrong else 0
            alike.setdefault((lengths, item.read), []).append(i)
        items = list(self.items)
        for places in alike.values():
            for to, origin in zip(places, rng.sample(places, len(places)), strict=True):
                given = self.items[origin]
                items[to] = replace(self.items[to], answers=given.answers, wrong=given.wrong)
        return replace(self, items=tuple(items))

    def texts(self, index: int) -> tuple[str, ...]:
        """The clean prompt of example `index`, a string per token."""
        return tuple(str(self.tokenizer.decode([token])) for token in self.items[index].clean)
