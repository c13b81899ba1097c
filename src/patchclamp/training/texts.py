"""Data from tensors and from texts: rows in an order that is a function of the seed, some set aside."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.training.data import Rows, tensors_digest

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tensor of rows. Each epoch goes through all of them, in an order drawn from the seed and the epoch's number.

    Args:
        tokens: ids, in memory.
        mask: real tokens; None: all.
        weights: of each token's prediction; None: 1, and 0 at padding.
        labels: numbers of each row.
        seed: of the order, and of which rows are set aside.
        held: rows set aside, for negative steps: step -1 gives the first ones, -2 those behind them, and so on in a circle.
        label: what the rows are, in words.

    Raises:
        TrainingError: no rows are left to train on.
    """

    tokens: Int[Tensor, "row position"]
    mask: Bool[Tensor, "row position"] | None = None
    weights: Float[Tensor, "row position"] | None = None
    labels: Mapping[str, Tensor] | None = None
    seed: int = 0
    held: int = 0
    label: str = "tokens"

    def __post_init__(self) -> None:
        if not 0 <= self.held < len(self.tokens):
            raise TrainingError(
                f"{self.held} of {len(self.tokens)} rows were to be set aside: leave at least one to train on "
                "(give more text, or shorter rows)"
            )

    @property
    def name(self) -> str:
        """Label, sizes, seed, and SHA-256 of all tensors."""
        return self._name

    @cached_property
    def _name(self) -> str:
        found = tensors_digest({"tokens": self.tokens, "mask": self.mask, "weights": self.weights, **(self.labels or {})})
        count, width = self.tokens.shape
        return f"{self.label}: {count} rows of {width}, {self.held} set aside, seed {self.seed}, sha256 {found}"

    @property
    def trained(self) -> int:
        """Rows of an epoch."""
        return len(self.tokens) - self.held

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update: the next `count` of the endless sequence of epochs; of a negative step, rows that are set aside.

        Raises:
            TrainingError: rows set aside are asked for, and there are none.
        """
        if step < 0 and not self.held:
            raise TrainingError("rows that are set aside were asked for, and there are none: give held=, or --held-out")
        numbers = torch.arange(count) + (-step - 1 if step < 0 else step) * count
        dealt = _order(len(self.tokens), self.seed, -1)
        if step < 0:
            return self.at(dealt[numbers % self.held])
        epochs = numbers // self.trained
        orders = {int(epoch): _order(self.trained, self.seed, int(epoch)) for epoch in epochs.unique()}
        places = torch.stack([orders[int(epoch)][number % self.trained] for number, epoch in zip(numbers, epochs, strict=True)])
        return self.at(dealt[self.held + places])

    def at(self, chosen: Int[Tensor, " row"]) -> Rows:
        """Rows by their places in the tensor."""
        tokens, mask = self.tokens[chosen].long(), None if self.mask is None else self.mask[chosen]
        weights = torch.ones(tokens.shape) if self.weights is None else self.weights[chosen]
        if self.weights is None and mask is not None:
            weights = mask.float()
        labels = None if self.labels is None else {name: value[chosen] for name, value in self.labels.items()}
        return Rows(tokens, weights, mask, labels)


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> Int[Tensor, " row"]:
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "big") >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(drawn))


def texts(
    source: str | Path | Sequence[str], tokenizer: Any, length: int = 128, *, pack: bool = True, column: str = "text", held: float = 0.0,
    seed: int = 0,
) -> Tokens:  # fmt: skip
    """Rows of tokens from texts, all of them in memory.

    Args:
        source: a text file (one text), JSONL or Parquet (a text per row), a folder of such files, a folder that `datasets` saved, or
            texts.
        tokenizer: the model's.
        length: tokens of a row.
        pack: join all texts, each ended by the tokenizer's end-of-text token where it has one, and cut them into rows; what is left
            over is dropped, and attention goes from one text to those before it in its row. False: a text per row, special tokens as
            the tokenizer does, cut at `length`, padded on the right.
        column: of JSONL, Parquet and `datasets`.
        held: share of rows set aside for negative steps, at least one where it is above 0.
        seed: of the order of rows.

    Raises:
        TrainingError: nothing to read there, no such column, or less text than one row.
    """
    if tokenizer is None:
        raise TrainingError("texts were given, and the model has no tokenizer: give one (--tokenizer), or rows of token ids")
    if length < 2 or not 0 <= held < 1:
        raise TrainingError(f"rows of {length} tokens, {held} of them set aside, were asked: give 2 or more, and a share below 1")
    given = list(read_texts(source, column)) if isinstance(source, str | Path) else list(source)
    ids = [list(tokenizer(text, add_special_tokens=not pack, verbose=False)["input_ids"]) for text in given]
    tokens, mask = _packed(ids, tokenizer.eos_token_id, length) if pack else _padded(ids, length)
    if not len(tokens):
        raise TrainingError(
            f"{len(given)} texts hold {sum(map(len, ids))} tokens: less than one row of {length}. Give more, or shorter rows"
        )
    aside = max(1, round(held * len(tokens))) if held else 0
    what = Path(source).name if isinstance(source, str | Path) else f"{len(given)} texts"
    return Tokens(tokens, mask, seed=seed, held=aside, label=what)


def _packed(ids: Sequence[Sequence[int]], end: int | None, length: int) -> tuple[Tensor, None]:
    flat = [token for text in ids for token in (*text, *(() if end is None else (end,)))]
    return torch.tensor(flat[: len(flat) // length * length], dtype=torch.int32).reshape(-1, length), None


def _padded(ids: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    kept = [list(text[:length]) for text in ids if len(text) > 1]
    width = max(map(len, kept), default=2)
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in kept], dtype=torch.int32).reshape(-1, width)
    mask = torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in kept]).reshape(-1, width)
    return tokens, mask


def read_texts(source: str | Path, column: str = "text") -> Iterator[str]:
    """Texts of a file, of a folder of files (in order of their names), or of a folder that `datasets` saved.

    Raises:
        TrainingError: there is nothing to read, or no such column.
    """
    path = Path(source).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _saved(path, column)
        return
    files = sorted(one for one in path.iterdir() if one.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise TrainingError(
            f"there is no text at {path}: give a file ({', '.join(SUFFIXES)}), a folder of them, or one that `datasets` saved"
        )
    for file in files:
        yield from _READERS[file.suffix](file, column) if file.suffix in _READERS else _refuse(file)


def _refuse(file: Path) -> Iterator[str]:
    raise TrainingError(f"{file} ends in {file.suffix or 'nothing'}: texts are read from {', '.join(SUFFIXES)}")


def _text(file: Path, column: str) -> Iterator[str]:
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{file} is no text in UTF-8: {error}") from None


def _jsonl(file: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TrainingError(f"{file}, line {number} is no JSON: {error}") from None
        yield _cell(row.get(column) if isinstance(row, dict) else None, f"{file}, line {number}", column)


def _parquet(file: Path, column: str) -> Iterator[str]:
    import polars as pl

    try:
        frame = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise TrainingError(f"{file} is no Parquet: {error}") from None
    if column not in frame.columns:
        raise TrainingError(f"{file} has no column {column!r} but {', '.join(frame.columns)}: name the texts' (--column)")
    for number, cell in enumerate(frame[column], 1):
        yield _cell(cell, f"{file}, row {number}", column)


def _saved(path: Path, column: str) -> Iterator[str]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise TrainingError(f"{path} was saved by datasets: pip install 'patchclamp[datasets]'") from None
    found: Any = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        if "train" not in found:
            raise TrainingError(f"{path} has no split 'train' but {', '.join(map(str, found))}: give the folder of one split")
        found = found["train"]
    if column not in found.column_names:
        raise TrainingError(f"{path} has no column {column!r} but {', '.join(found.column_names)}: name the texts' (--column)")
    for number, cell in enumerate(found[column], 1):
        yield _cell(cell, f"{path}, row {number}", column)


def _cell(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise TrainingError(f"{where} has no text in {column!r}: name the texts' column (--column)")
    return value


_READERS = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}
