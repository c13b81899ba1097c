"""Small tokenizers, made on the spot: what tasks must work with besides the tokenizers of real models."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

DIGITS = {
    "single": r"\p{N}",
    "threes": r"\p{N}{1,3}",
    "pairs": r" ?\p{N}{1,2}",
}
"""How a number is cut before merges are learned: digit by digit, in threes from the left, in pairs."""


def byte_level(
    texts: Iterable[str], digits: str = "single", bos: bool = False, template: str | None = None, size: int = 2000
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one rule for digits; with `bos` it puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(DIGITS[digits] + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", *SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", tokenizer.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=SPECIAL)
    made.chat_template = template
    return made


def words(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Every word, with the blank before it or without, every mark and every pair of digits is a token; the rest is unknown."""
    cut = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}{1,2}|[^\s\p{L}\p{N}]|\s"), "isolated")
    pieces = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    found = sorted({form for piece in pieces for form in (piece, piece.strip() or piece)})
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1} | {piece: i for i, piece in enumerate(found, 2)}, "<unk>"))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


class Slow:
    """A tokenizer without character offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **options: Any) -> Any:
        assert not options.get("return_offsets_mapping")
        return self.tokenizer(text, **options)

    def decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids))
