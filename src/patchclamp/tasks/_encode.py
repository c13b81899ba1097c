"""Encoding: from a pair to token ids.

The answer is what follows in tokenize(prompt + answer), whose beginning must be the prompt's ids. A pair that breaks a rule
raises `Misfit`, which says why and on which words; `Task.examples` counts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq

from patchclamp.errors import TaskError
from patchclamp.tasks._chat import Chat, messages_of, render, shift_spans
from patchclamp.tasks._examples import Example
from patchclamp.tasks._pairs import Answers, Pair, Prompt, Range, Tokens
from patchclamp.tasks._tokens import Misfit, Tokenizer, id_named, ids_of, special_prefix, token_ranges, with_bos

NO_LIMIT = 10**6  # tokenizers without a limit of their own say a huge number


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the task's rules.

    Args:
        tokenizer: text to ids.
        bos: None: special tokens as the tokenizer does; True: exactly one BOS; False: none. Token ids are taken as they are
            under None.
        chat: how messages are rendered, and whether text is wrapped.
        window: tokens of a window of plain text, special tokens included; fewer where the tokenizer's model takes fewer.
        single: whether answers must be single tokens.
    """

    tokenizer: Tokenizer
    bos: bool | None = None
    chat: Chat = field(default_factory=Chat)
    window: int = 128
    single: bool = False

    def __call__(self, pair: Pair) -> list[Example]:
        """The examples of a pair: one, or the windows of a plain text.

        Raises:
            Misfit: the pair breaks a rule of the encoding.
        """
        return [_encode(self, pair)] if pair.answer else _windows(self, pair)


@dataclass(frozen=True)
class _Side:
    """One prompt, its answers' ids, and what is needed to place spans."""

    tokens: Tokens
    answers: tuple[Tokens, ...]
    text: str
    prefix: int
    spans: dict[str, Range]
    special: Tokens | None = None


def _encode(encoder: Encoder, pair: Pair) -> Example:
    alternatives = (*pair.answer, *pair.wrong)
    clean = _side(encoder, pair.clean, alternatives)
    right, wrong = clean.answers[: len(pair.answer)], clean.answers[len(pair.answer) :]
    longest = len(clean.tokens) + max(map(len, clean.answers)) - 1
    _check_tokens(encoder, pair, (clean.tokens, *clean.answers), longest)
    _check_answers(encoder, pair, right, wrong)
    corrupt = None
    if pair.corrupt is not None:
        other = _side(encoder, pair.corrupt, alternatives, clean.special)
        corrupt = other.tokens
        _check_alignment(encoder.tokenizer, pair, clean.tokens, corrupt)
        if other.answers != clean.answers:
            raise Misfit("answers are split differently after the corrupt prompt", _words(alternatives))
        _check_tokens(encoder, pair, (corrupt,), longest)
    group = pair.group or "|".join(sorted(str(part) for part in (pair.clean, pair.corrupt)))
    spans = _token_spans(encoder, pair, clean)
    return Example(clean.tokens, right, pair, corrupt, wrong, spans, group=group, read=pair.read)


def _side(encoder: Encoder, prompt: Prompt, alternatives: Answers, special: Tokens | None = None) -> _Side:
    """Ids of a prompt and of what follows in tokenize(prompt + answer); `special` goes before, where it is known already."""
    tokenizer = encoder.tokenizer
    messages = messages_of(prompt, encoder.chat)
    text, spans = "", dict[str, Range]()
    if messages is not None:
        text, spans = render(tokenizer, messages, encoder.chat)
    elif isinstance(prompt, str):
        text = prompt
    if not text:
        tokens = with_bos(tokenizer, tuple(token for token in prompt if isinstance(token, int)), encoder.bos)
        given = [ids_of(tokenizer, [one])[0] if isinstance(one, str) else one for one in alternatives]
        return _Side(tokens, tuple(given), "", 0, {})
    if isinstance(prompt, str) and messages is not None:  # a wrapped answer begins a message of its own
        alternatives = tuple(one.lstrip() if isinstance(one, str) else one for one in alternatives)
    said = [one for one in alternatives if isinstance(one, str)]
    start, *joined = ids_of(tokenizer, [text, *(text + one for one in said)])
    merged = [one for one, whole in zip(said, joined, strict=True) if whole[: len(start)] != start]
    prefix = special_prefix(tokenizer, text, start, encoder.bos) if special is None else special
    if merged:
        raise Misfit("answer merges with the end of the prompt", merged)
    after = iter(whole[len(start) :] for whole in joined)
    answers = tuple(next(after) if isinstance(one, str) else one for one in alternatives)
    if messages is not None:
        tokens, skipped = _once(tokenizer, prefix, start, encoder.bos)
        return _Side(tokens, answers, text, skipped, spans, prefix)
    return _Side(prefix + start, answers, text, len(prefix), spans, prefix)


def _once(tokenizer: Tokenizer, prefix: Tokens, start: Tokens, bos: bool | None) -> tuple[Tokens, int]:
    """A rendered chat with its BOS exactly once: most templates write one, and most tokenizers would add another."""
    token = id_named(tokenizer, "bos_token_id")
    wanted = token in (prefix + start)[: len(prefix) + 1] if bos is None else bos
    tokens = with_bos(tokenizer, start, wanted) if token is not None else prefix + start
    return tokens, len(tokens) - len(start)


def _check_answers(encoder: Encoder, pair: Pair, right: tuple[Tokens, ...], wrong: tuple[Tokens, ...]) -> None:
    for given, found in ((pair.answer, right), (pair.wrong, wrong)):
        if not all(found):
            raise Misfit("answer has no token of its own", _words(given))
        long = [one for one, tokens in zip(given, found, strict=True) if len(tokens) > 1]
        if long and (encoder.single or pair.read):
            raise Misfit("answer of several tokens", _words(long))
        if long and len(found) > 1:
            raise Misfit("one of several alternatives takes several tokens (alternatives must be single tokens)", _words(long))
    same = any(map(eq, right, wrong)) if pair.read else bool(set(right) & set(wrong))
    if same:
        raise Misfit("answer and wrong answer are the same", _words(pair.answer))


def _check_alignment(tokenizer: Tokenizer, pair: Pair, clean: Tokens, corrupt: Tokens) -> None:
    if clean == corrupt:
        raise Misfit("clean and corrupt are the same", alignment=True)
    if len(clean) != len(corrupt):
        raise Misfit("clean and corrupt do not align: they have different numbers of tokens", _differing(pair), alignment=True)


def _check_tokens(encoder: Encoder, pair: Pair, parts: Sequence[Tokens], longest: int) -> None:
    limit = _limit(encoder.tokenizer)
    if longest > limit:
        raise Misfit(f"longer than the {limit} tokens that the tokenizer's model takes")
    unknown = id_named(encoder.tokenizer, "unk_token_id")
    if unknown is None or not any(unknown in part for part in parts):
        return
    if unknown not in (id_named(encoder.tokenizer, "bos_token_id"), id_named(encoder.tokenizer, "eos_token_id")):
        texts = [part for part in (pair.clean, pair.corrupt, *pair.answer, *pair.wrong) if isinstance(part, str)]
        words = sorted({f" {word}" for text in texts for word in text.split()})
        strange = [word for word, row in zip(words, ids_of(encoder.tokenizer, words), strict=True) if unknown in row]
        raise Misfit("holds a word that the tokenizer does not know", strange)


def _limit(tokenizer: Tokenizer) -> int:
    """How many tokens the tokenizer's model takes."""
    limit = getattr(tokenizer, "model_max_length", None)
    return min(limit, NO_LIMIT) if isinstance(limit, int) else NO_LIMIT


def _token_spans(encoder: Encoder, pair: Pair, side: _Side) -> dict[str, Range]:
    last = len(side.tokens)
    spans: dict[str, Range] = {}
    if not side.text:
        shift = len(side.tokens) - len(pair.clean)
        spans = {name: (start + shift, end + shift) for name, (start, end) in pair.spans.items()}
    else:
        messages = messages_of(pair.clean, encoder.chat)
        given = dict(pair.spans) if messages is None else shift_spans(pair.spans, messages, side.spans)
        bare = side.tokens[side.prefix :] if side.prefix >= 0 else ids_of(encoder.tokenizer, [side.text])[0]
        ranges = token_ranges(encoder.tokenizer, side.text, bare, {**side.spans, **given})
        spans = {name: (start + side.prefix, end + side.prefix) for name, (start, end) in ranges.items()}
    wrong = [name for name, (start, end) in spans.items() if not 0 <= start < end <= last]
    if wrong:
        raise TaskError(f"span {wrong[0]!r} lies outside its prompt of {last} tokens: {pair.clean!r}")
    return {**spans, "end": (last - 1, last)}


def _windows(encoder: Encoder, pair: Pair) -> list[Example]:
    """Plain text, cut into windows that each begin with the special tokens; every token that has something before it, or
    those of the marked ranges, are to be predicted."""
    tokenizer, text = encoder.tokenizer, pair.clean
    if isinstance(text, str):
        (tokens,) = ids_of(tokenizer, [text])
        prefix = special_prefix(tokenizer, text, tokens, encoder.bos)
        marked = None if pair.targets is None else _covered(tokenizer, text, tokens, pair.targets)
    else:
        given = tuple(token for token in text if isinstance(token, int))
        if len(given) < len(text):
            raise TaskError("a chat needs an 'answer': plain text is text or token ids")
        tokens = with_bos(tokenizer, given, encoder.bos)
        prefix, more = (), len(tokens) - len(given)
        marked = None if pair.targets is None else {k + more for start, end in pair.targets for k in range(start, end)}
    window = min(encoder.window, _limit(tokenizer))
    step = window - len(prefix)
    if step < 2:
        raise TaskError(f"a window of {window} tokens holds nothing to predict: give a larger window")
    found: list[Example] = []
    for start in range(0, len(tokens), step):
        row = prefix + tokens[start : start + step]
        shift = start - len(prefix)
        first = max(1, len(prefix))
        targets = tuple(k for k in range(first, len(row)) if marked is None or k + shift in marked)
        if targets:
            spans, group = {"end": (len(row) - 1, len(row))}, pair.group or f"{start}: {text[:60]}"
            found.append(Example(row, (), pair, spans=spans, targets=targets, group=group))
    if not found:
        raise Misfit("no token to predict")
    return found


def _covered(tokenizer: Tokenizer, text: str, tokens: Tokens, targets: Sequence[Range]) -> set[int]:
    ranges = token_ranges(tokenizer, text, tokens, {str(i): span for i, span in enumerate(targets)})
    return {k for start, end in ranges.values() for k in range(start, end)}


def _differing(pair: Pair) -> list[str]:
    """The words in which two texts differ: word by word, or the stretch between what they share at both ends."""
    if not (isinstance(pair.clean, str) and isinstance(pair.corrupt, str)):
        return []
    one, other = ([word.strip(".,;:?!") for word in text.split()] for text in (pair.clean, pair.corrupt))
    if len(one) == len(other):
        return sorted({f"{a}/{b}" for a, b in zip(one, other, strict=True) if a != b})
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return [f"{' '.join(one)}/{' '.join(other)}"]


def _words(answers: Sequence[str | Tokens]) -> list[str]:
    return [str(answer) for answer in answers]
