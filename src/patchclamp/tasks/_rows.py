"""From examples to the rows of a batch: teacher forcing, left padding, targets and spans."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.tasks._batch import Batch
from patchclamp.tasks._examples import Example
from patchclamp.tasks._pairs import Range, Tokens


class _Target(NamedTuple):
    position: int
    right: Tokens
    wrong: Tokens


class _Row(NamedTuple):
    example: int
    sign: float
    tokens: Tokens
    corrupt: Tokens | None
    targets: list[_Target]
    spans: dict[str, Range]


def make_batch(examples: Sequence[Example], pad: int) -> Batch:
    """Rows for `examples`: one each, and one more for a wrong answer where any answer in the batch has several tokens."""
    forced = any(len(answer) > 1 for one in examples for answer in (*one.answers, *one.wrong))
    rows = [row for i, one in enumerate(examples) for row in (_forced(i, one) if forced else [_plain(i, one)])]
    width = max(len(row.tokens) for row in rows)
    targets = [(r, width - len(row.tokens), target) for r, row in enumerate(rows) for target in row.targets]
    wrong = [target.wrong for _, _, target in targets]
    names = sorted({name for row in rows for name in row.spans})
    return Batch(
        tokens=_padded([row.tokens for row in rows], width, pad),
        mask=torch.tensor([[column >= width - len(row.tokens) for column in range(width)] for row in rows]),
        corrupt=_padded([row.corrupt or () for row in rows], width, pad) if rows[0].corrupt else None,
        target_row=torch.tensor([r for r, _, _ in targets], dtype=torch.long),
        target_position=torch.tensor([shift + target.position for _, shift, target in targets], dtype=torch.long),
        answers=_choices([target.right for _, _, target in targets]),
        wrong=_choices(wrong) if any(wrong) else None,
        example=torch.tensor([row.example for row in rows]),
        sign=torch.tensor([row.sign for row in rows]),
        spans={name: _span(rows, name, width) for name in names},
        examples=tuple(examples),
    )


def _plain(i: int, one: Example) -> _Row:
    """The row of an example whose answers are single tokens, or of a plain text."""
    if not one.answers:
        targets = [_Target(at - 1, (one.clean[at],), ()) for at in one.targets]
    elif one.read:
        wrong = one.wrong or ((),) * len(one.read)
        sides = zip(one.read, one.answers, wrong, strict=True)
        targets = [_Target(one.spans[name][1] - 1, right, other) for name, right, other in sides]
    else:
        right, wrong = (tuple(token for answer in side for token in answer) for side in (one.answers, one.wrong))
        targets = [_Target(len(one.clean) - 1, right, wrong)]
    return _Row(i, 1.0, one.clean, one.corrupt, targets, _spans(one, 0))


def _forced(i: int, one: Example) -> list[_Row]:
    """Rows that end in the answer without its last token: the right answer's, then the wrong answer's with sign -1."""
    if not one.answers:
        return [_plain(i, one)]
    sides = [(1.0, one.answers), (-1.0, one.wrong)]
    return [_answer_row(i, one, sign, side) for sign, side in sides if side]


def _answer_row(i: int, one: Example, sign: float, side: tuple[Tokens, ...]) -> _Row:
    last = len(one.clean) - 1
    if len(side) == 1:
        targets = [_Target(last + t, (token,), ()) for t, token in enumerate(side[0])]
        said = side[0][:-1]
    else:  # alternatives are single tokens
        targets = [_Target(last, tuple(token for answer in side for token in answer), ())]
        said: Tokens = ()
    corrupt = None if one.corrupt is None else one.corrupt + said
    return _Row(i, sign, one.clean + said, corrupt, targets, _spans(one, len(said)))


def _spans(one: Example, said: int) -> dict[str, Range]:
    """The example's spans, and `answer`: the positions whose logits predict the answer (of answers at spans, all between them)."""
    spans = dict(one.spans)
    if one.read:
        ends = [one.spans[name][1] for name in one.read]
        spans["answer"] = min(ends) - 1, max(ends)
    elif one.answers:
        spans["answer"] = len(one.clean) - 1, len(one.clean) + said
    return spans


def _padded(rows: Sequence[Tokens], width: int, pad: int) -> Int[Tensor, "row position"]:
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)


def _choices(rows: Sequence[Tokens]) -> Int[Tensor, "target choice"]:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long)


def _span(rows: Sequence[_Row], name: str, width: int) -> Int[Tensor, "row 2"]:
    """Columns of a span in each row; an empty range where the row has no such span."""
    found: list[Range] = []
    for row in rows:
        start, end = row.spans.get(name, (0, 0))
        shift = width - len(row.tokens) if end else 0
        found.append((start + shift, end + shift))
    return torch.tensor(found, dtype=torch.long)
