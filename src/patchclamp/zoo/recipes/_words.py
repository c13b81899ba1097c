"""A tokenizer with a token for each word (with the blank before it), each punctuation mark and each pair of digits."""

import re
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECES = r" ?[A-Za-z]+(?:'[a-z]+)?| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]|\s"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
BOS, EOS, PAD = SPECIAL.index("<bos>"), SPECIAL.index("<eos>"), SPECIAL.index("<pad>")


def pieces(text: str) -> list[str]:
    """A text cut into tokens: nothing is lost, so that they join to the text again."""
    return re.findall(PIECES, text)


class Listener:
    """A tokenizer that knows every word, and remembers those it has seen: tasks speak to it before there is a vocabulary."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: list[str], /, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self._ids.setdefault(piece, len(self._ids)) for piece in pieces(one)] for one in text]}

    def decode(self, token_ids: list[int], /) -> str:
        """The text of some ids."""
        known = list(self._ids)
        return "".join(known[token] for token in token_ids)

    @property
    def heard(self) -> tuple[str, ...]:
        """Every piece seen so far, sorted."""
        return tuple(sorted(self._ids))


def vocabulary(heard: Iterable[str]) -> tuple[str, ...]:
    """Special tokens, punctuation, all numbers of one and two digits with and without a blank, and the words that were heard."""
    numbers = [*string.digits, *(f"{number:02}" for number in range(100))]
    blanks = [*numbers, *(f" {number}" for number in numbers), " ", "\n", *string.punctuation]
    return tuple(dict.fromkeys((*SPECIAL, *blanks, *heard)))


def word_tokenizer(words: tuple[str, ...]) -> "PreTrainedTokenizerFast":
    """A fast tokenizer over `words`; `<bos>` goes before every text, and decoding joins tokens as they are."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip
