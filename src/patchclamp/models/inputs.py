"""Plain inputs (text, token ids) as batches without targets."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.errors import ModelError
from patchclamp.tasks._batch import Batch


def token_batch(tokens: Int[Tensor, "row position"] | Sequence[Sequence[int]]) -> Batch:
    """Rows of token ids, left-padded where they differ in length."""
    rows = [list(map(int, row)) for row in tokens]
    if not rows or not all(rows):
        raise ModelError("nothing to run: the input holds no tokens")
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    none = torch.zeros(0, dtype=torch.long)
    end = torch.tensor([[width - 1, width]] * len(rows))
    return Batch(
        tokens=ids, mask=mask, corrupt=None, target_row=none, target_position=none, answers=none[:, None], wrong=None,
        example=torch.arange(len(rows)), sign=torch.ones(len(rows)), spans={"end": end}, examples=(),
    )  # fmt: skip


def text_batch(tokenizer: Any, texts: Sequence[str], bos: bool | None = None) -> Batch:
    """Texts, with special tokens as the tokenizer adds them (`bos` None), or with or without a first BOS token."""
    if tokenizer is None:
        raise ModelError("text was given, but this model came without a tokenizer: give tokenizer=, or token ids")
    if not texts or not all(texts):
        raise ModelError("nothing to run: a prompt is empty")
    rows = [list(tokenizer(text, add_special_tokens=bos is None)["input_ids"]) for text in texts]
    if bos:
        if tokenizer.bos_token_id is None:
            raise ModelError("bos=True was asked, but the tokenizer has no BOS token")
        rows = [[tokenizer.bos_token_id, *row] for row in rows]
    return token_batch(rows)


def prompts_of(batch: Batch) -> Batch:
    """The prompts of a batch to be continued: right answers' rows, cut behind the prompt and padded on the left anew."""
    rows = (batch.sign > 0).nonzero()[:, 0].tolist()
    last = batch.spans["end"][:, 1].tolist()
    cut = token_batch([batch.tokens[row, : last[row]][batch.mask[row, : last[row]]].tolist() for row in rows])
    moved = torch.tensor([cut.tokens.shape[1] - last[row] for row in rows])[:, None]
    spans = {name: (span.cpu()[rows] + moved).clamp(0, cut.tokens.shape[1]) for name, span in batch.spans.items()}
    return replace(cut, spans=spans)
