"""Pair: two prompts that differ in one fact, as text, token ids or chat messages, before any tokenizer has seen them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from patchclamp.errors import TaskError

Tokens = tuple[int, ...]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


Prompt = str | Tokens | tuple[Message, ...]
Answers = tuple[str | Tokens, ...]
PromptLike = str | Sequence[int] | Sequence[Message | Mapping[str, str]]
AnswersLike = str | int | Sequence[int] | Sequence[str | Sequence[int]]


@dataclass(frozen=True, init=False)
class Pair:
    """A prompt with its answer and, where there is one, a second prompt that differs from it in one fact.

    Args:
        clean: the prompt: text, token ids, or chat messages (mappings with `role` and `content` are accepted).
        answer: what follows it. A string, or several of which any is right; each may be token ids too. Empty for plain text,
            whose own tokens are to be predicted.
        corrupt: the other prompt, of as many tokens.
        wrong: what is compared with the answer: usually what follows the corrupt prompt.
        spans: name -> (start, end) in `clean`: characters of a text or of the last user message, tokens of token ids.
        group: pairs of one group (a template, a word) stay in one set when a task is split, and intervals resample groups.
        mirrors: whether `wrong` is right after `corrupt`, so that the pair can be read in the other direction.
        targets: for plain text, the ranges of characters (or of tokens) to be predicted; None for all.
        read: for models that answer inside the prompt (they label positions, rather than continue): names of spans. `answer` and
            `wrong` then hold one answer each per span, which is read at the span's last token.

    Raises:
        TaskError: a field has the wrong form.
    """

    clean: Prompt
    answer: Answers
    corrupt: Prompt | None
    wrong: Answers
    spans: Mapping[str, Range]
    group: str
    mirrors: bool
    targets: tuple[Range, ...] | None
    read: tuple[str, ...]

    def __init__(
        self,
        clean: PromptLike,
        answer: AnswersLike = (),
        corrupt: PromptLike | None = None,
        wrong: AnswersLike = (),
        spans: Mapping[str, Sequence[int]] | None = None,
        group: str = "",
        mirrors: bool = True,
        targets: Sequence[Sequence[int]] | None = None,
        read: Sequence[str] = (),
    ) -> None:
        fix = object.__setattr__
        fix(self, "clean", as_prompt(clean, "clean"))
        fix(self, "corrupt", None if corrupt is None else as_prompt(corrupt, "corrupt"))
        fix(self, "answer", as_answers(answer, "answer"))
        fix(self, "wrong", as_answers(wrong, "wrong"))
        fix(self, "spans", {name: as_range(span, f"span {name!r}") for name, span in (spans or {}).items()})
        fix(self, "group", group)
        fix(self, "mirrors", mirrors)
        fix(self, "targets", None if targets is None else tuple(as_range(span, "a target") for span in targets))
        fix(self, "read", tuple(read))
        if self.corrupt is not None and type(self.corrupt) is not type(self.clean):
            raise TaskError("clean and corrupt must be of one form: both text, both token ids or both messages")
        if self.answer and self.targets is not None:
            raise TaskError("'targets' marks what to predict in plain text: a pair with an answer has no use for it")
        if not self.answer and (self.wrong or self.corrupt is not None):
            raise TaskError("a pair needs an 'answer'; plain text has neither 'corrupt' nor 'wrong'")
        if self.read:
            _check_read(self)

    @property
    def invertible(self) -> bool:
        """Whether clean and corrupt can change places. (Where answers are read at spans of the clean prompt, they cannot.)"""
        return self.mirrors and not self.read and self.corrupt is not None and bool(self.wrong)

    def mirror(self) -> "Pair":
        """The pair in the other direction; character spans, which belong to the clean text, are left out."""
        if self.corrupt is None or not self.invertible:
            raise TaskError(
                f"this pair cannot be mirrored, since it has no 'wrong' that is right after 'corrupt': {self.clean!r}"
            )
        return Pair(self.corrupt, self.wrong, self.clean, self.answer, {}, self.group)


def _check_read(pair: Pair) -> None:
    """Raise `TaskError` unless there is one answer, and one wrong answer if any, for each span that is read."""
    if missing := [name for name in pair.read if name not in pair.spans]:
        raise TaskError(f"'read' names {missing[0]!r}, and the pair's spans are {', '.join(pair.spans) or 'none'}")
    for name, given in (("answer", pair.answer), ("wrong", pair.wrong)):
        if len(given) != len(pair.read) and (given or name == "answer"):
            raise TaskError(f"{len(pair.read)} spans are read, and {len(given)} are given as {name!r}: give one for each")


def as_prompt(value: object, name: str) -> Prompt:
    """A prompt in its normal form: text, a tuple of token ids, or a tuple of messages."""
    if isinstance(value, str):
        if not value:
            raise TaskError(f"{name!r} is empty")
        return value
    if isinstance(value, Sequence) and value:
        items = list(cast(Sequence[object], value))
        if all(type(item) is int for item in items):
            return cast(Tokens, tuple(items))
        if all(isinstance(item, Message | Mapping) for item in items):
            return tuple(_as_message(item, name) for item in items)
    raise TaskError(f"{name!r} must be text, a list of token ids or a list of messages, not {_shown(value)}")


def as_answers(value: object, name: str) -> Answers:
    """Alternatives in their normal form: a tuple of strings and tuples of token ids."""
    if value is None:
        return ()
    if isinstance(value, str):
        if value:
            return (value,)
        value = (value,)
    if type(value) is int:
        return ((value,),)
    if not isinstance(value, Iterable):
        raise TaskError(f"{name!r} must be text, token ids or a list of alternatives, not {_shown(value)}")
    items = list(cast(Iterable[object], value))
    if items and all(type(item) is int for item in items):
        return (cast(Tokens, tuple(items)),)
    rows = [tuple(cast(Sequence[object], item)) if isinstance(item, list | tuple) else item for item in items]
    for row in rows:
        ids = isinstance(row, tuple) and all(type(token) is int for token in row)
        if not row or not (ids or isinstance(row, str)):
            raise TaskError(f"{name!r} holds {_shown(row)}: an alternative is text or token ids, and not empty")
    return cast(Answers, tuple(rows))


def as_range(value: object, name: str) -> Range:
    """A half-open range, checked."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        ends = list(cast(Sequence[Any], value))
        if len(ends) == 2 and all(type(end) is int for end in ends) and 0 <= ends[0] < ends[1]:
            return int(ends[0]), int(ends[1])
    raise TaskError(f"{name} must be [start, end] with 0 <= start < end, not {_shown(value)}")


def _as_message(value: object, name: str) -> Message:
    if isinstance(value, Message):
        return value
    row = cast(Mapping[str, object], value)
    role, content = row.get("role"), row.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise TaskError(f"{name!r} holds the message {_shown(value)}: a message has 'role' and 'content', both text")
    return Message(role, content)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "..."
