"""What tasks need of a tokenizer. Hugging Face tokenizers have it; so may any other."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Range, Tokens


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    `bos_token_id`, `unk_token_id`, `all_special_ids`, `model_max_length`, `is_fast` and `apply_chat_template` are used where
    the tokenizer has them.
    """

    def __call__(
        self, text: list[str], /, *, add_special_tokens: bool = ..., return_offsets_mapping: bool = ..., verbose: bool = ...
    ) -> Mapping[str, Any]:
        """`input_ids`, a list per text, and `offset_mapping` where asked for."""
        ...

    def decode(self, token_ids: list[int], /) -> str | list[str]:
        """The text of some ids."""
        ...


class Misfit(Exception):
    """A pair that does not fit the tokenizer: why, and the words it failed on. Counted, never shown to the user as such."""

    def __init__(self, reason: str, words: Sequence[str] = (), alignment: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.words, self.alignment = reason, tuple(words), alignment


def ids_of(tokenizer: Tokenizer, texts: Sequence[str], special: bool = False) -> list[Tokens]:
    """Token ids of each text, without special tokens unless asked for."""
    if not texts:  # tokenizers of transformers take no empty list
        return []
    try:
        rows = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raise a bare Exception at a character they do not have
        raise Misfit("refused by the tokenizer", [texts[0]]) from error
    return [tuple(int(token) for token in row) for row in rows]


def id_named(tokenizer: Tokenizer, name: str) -> int | None:
    """A special id by attribute name, such as `bos_token_id`."""
    value = getattr(tokenizer, name, None)
    return value if isinstance(value, int) else None


def special_prefix(tokenizer: Tokenizer, text: str, bare: Tokens, bos: bool | None) -> Tokens:
    """The special tokens that go before a text whose own ids are `bare`.

    As the tokenizer does (`bos` None), with exactly one BOS (True), or without BOS (False).
    What a tokenizer puts after a text (an end-of-text token) has no place between a prompt and its answer, and is left out.
    """
    (full,) = ids_of(tokenizer, [text], special=True)
    starts = [k for k in range(len(full) - len(bare) + 1) if full[k : k + len(bare)] == bare]
    if not starts:
        raise TaskError("this tokenizer splits a text differently when it adds special tokens: give token ids instead of text")
    return with_bos(tokenizer, full[: starts[0]], bos)


def with_bos(tokenizer: Tokenizer, tokens: Tokens, bos: bool | None) -> Tokens:
    """`tokens` with BOS at their beginning exactly once (True), without it (False), or as they are (None)."""
    if bos is None:
        return tokens
    token = id_named(tokenizer, "bos_token_id")
    if token is None:
        if bos:
            raise TaskError("a BOS token was asked for (bos=True), and this tokenizer has none")
        return tokens
    rest = tokens
    while rest and rest[0] == token:
        rest = rest[1:]
    return (token, *rest) if bos else rest


def offsets_of(tokenizer: Tokenizer, text: str) -> list[Range] | None:
    """Characters of each token, where the tokenizer can say (a `fast` one); else None."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    rows = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [(int(start), int(end)) for start, end in cast(list[Range], rows[0])]


def token_ranges(tokenizer: Tokenizer, text: str, tokens: Tokens, spans: Mapping[str, Range]) -> dict[str, Range]:
    """The tokens that cover named characters of `text`, whose ids without special tokens are `tokens`.

    By character offsets; where the tokenizer has none, by tokenising what precedes the two ends of a span.
    """
    beyond = [name for name, (_, end) in spans.items() if end > len(text)]
    if beyond:
        raise TaskError(f"span {beyond[0]!r} ends at character {spans[beyond[0]][1]} of a text of {len(text)}: {text[:80]!r}")
    offsets = offsets_of(tokenizer, text) if spans else None
    if offsets is None:
        return {name: _range_by_ids(tokenizer, text, tokens, span) for name, span in spans.items()}
    found: dict[str, Range] = {}
    for name, (start, end) in spans.items():
        inside = [k for k, (first, last) in enumerate(offsets) if last > start and first < end]
        if not inside:
            raise Misfit("a span covers no token", [text[start:end]])
        found[name] = inside[0], inside[-1] + 1
    return found


def _range_by_ids(tokenizer: Tokenizer, text: str, tokens: Tokens, span: Range) -> Range:
    before, upto = text[: span[0]].rstrip(), text[: span[1]]
    first = _shared(ids_of(tokenizer, [before])[0], tokens) if before else 0
    (through,) = ids_of(tokenizer, [upto])
    last = _shared(through, tokens)
    return first, max(first + 1, last if last == len(through) else last + 1)


def _shared(one: Tokens, other: Tokens) -> int:
    """Length of the common beginning."""
    k = 0
    while k < min(len(one), len(other)) and one[k] == other[k]:
        k += 1
    return k
