"""Generation: our own decoding loop, so that edits act alike with and without a cache."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import ModelError, NumericsError
from patchclamp.models.editing import During, Edit, Edits, Pass, Stretch
from patchclamp.models.inputs import prompts_of
from patchclamp.models.model import Inputs, Model
from patchclamp.models.sampling import Generation, Sampler
from patchclamp.models.scope import still


def generate(
    model: Model,
    prompts: Inputs,
    edits: Edits | None = None,
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: bool = True,
    stop: Sequence[str | int] = (),
    on: Literal["all", "prompt", "generation"] = "all",
) -> Generation:
    """Continue prompts, with edits on.

    An edit is called for one stretch of columns at a time: for the prompt (`Seen.phase` "prompt", step 0) and for each new
    token that is fed back (phase "generation", step = tokens generated so far); `Seen.mask` and `Seen.positions` are of these
    columns. That holds with and without a cache, so both give the same tokens (up to rounding where two tokens tie). At keys
    and values, which attention reads whole, every call edits every stretch so far, each as its own phase and step say; the
    cache itself keeps what the model computed before the edit. At scores and patterns a stretch is its queries, with the keys
    up to its last column. Positions, spans and `@prompt` refer to the prompt; `@generation` to the new tokens.

    Args:
        prompts: text, texts, token ids, or a batch (its clean prompts, without answers).
        edits: by site.
        max_new_tokens: at most so many new tokens per row.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the smallest set of likeliest tokens with this much probability.
        seed: of the drawing.
        cache: keep keys and values (one forward pass over the prompt, then one over each new token); without, every step runs
            the whole sequence.
        stop: token ids, or strings, at whose end a row ends; the model's own end-of-sequence tokens always end it.
        on: during which phase edits act.

    Raises:
        GateError: an edit that does not fit, a sampling setting out of range.
        ModelError: nothing to run; stop strings without a tokenizer; the model looks both ways, so that nothing follows.
        NumericsError: NaN logits.
    """
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens={max_new_tokens} was asked: it must be 1 or more")
    if not model.anatomy.causal:
        raise ModelError(f"{model.name} labels every position and looks both ways: it has no next token to generate, so run it")
    if model.tokenizer is None and any(isinstance(end, str) for end in stop):
        raise ModelError("stop strings need a tokenizer, and this model came without: give token ids")
    batch = prompts_of(model.batch(prompts)).to(model.device)
    sampler = Sampler(temperature, top_k, top_p, seed)
    chance = sampler.generator()
    rows = _Rows(model, batch.tokens, batch.mask, stop)
    kept = _new_cache() if cache else None
    with torch.no_grad(), still(model.hf), model.editing(_during(edits or {}, on), batch) as now:
        whole = any(site.kind == "logits" for site in edits or {})
        for step in range(max_new_tokens):
            logits = _next_logits(model, rows, now, kept, whole)
            rows.append(sampler(logits, chance), logits.log_softmax(-1))
            if not rows.running:
                break
            now.ran = 0 if kept is None else rows.tokens.shape[1] - 1
            _grow(now, rows.mask, step + 1)
    return rows.done()


def _during(edits: Edits, on: Literal["all", "prompt", "generation"]) -> Edits:
    if on == "all":
        return edits

    def only(given: Edit | Iterable[Edit]) -> list[Edit]:
        return [During(edit, on) for edit in ([given] if isinstance(given, Edit) else given)]

    return {site: only(given) for site, given in edits.items()}


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()  # without a config it keeps every column, also of sliding windows: sites then mean the same everywhere


def _grow(now: Pass, mask: Bool[Tensor, "row position"], step: int) -> None:
    """One more stretch: the token generated in the last step."""
    width = mask.shape[1]
    prompt = Stretch(0, now.mask.shape[1], "prompt", 0)
    now.stretches = (*(now.stretches or (prompt,)), Stretch(width - 1, width, "generation", step))
    now.mask, now.positions = mask, (mask.long().cumsum(-1) - 1).clamp(min=0)


def _next_logits(model: Model, rows: "_Rows", now: Pass, cache: Any, whole: bool) -> Float[Tensor, "row token"]:
    """Logits of the last column, in float32 or wider. `whole`: an edit wants to see the logits of every column."""
    options: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    if model.anatomy.takes_positions:
        options["position_ids"] = now.positions[:, now.ran :]
    if model.anatomy.keeps_logits and not whole:
        options["logits_to_keep"] = 1
    logits = model.hf(input_ids=rows.tokens[:, now.ran :], attention_mask=now.mask.long(), **options).logits[:, -1]
    if bool(torch.isnan(logits).any()):
        raise NumericsError(
            f"{model.name} gives NaN logits while generating: the weights or an edit hold NaN, or {model.dtype} overflows"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


class _Rows:
    """The rows of a generation as they grow; those that have ended are padded, under the mask."""

    def __init__(
        self, model: Model, tokens: Int[Tensor, "row position"], mask: Bool[Tensor, "row position"], stop: Sequence[str | int]
    ) -> None:
        self.tokenizer = model.tokenizer
        self.tokens, self.mask = tokens, mask
        self.ends = _end_tokens(model.hf)
        self.stop_ids = {end for end in stop if isinstance(end, int)}
        self.stop_texts = tuple(end for end in stop if isinstance(end, str))
        self.prompts = tuple(tuple(row[real].tolist()) for row, real in zip(tokens, mask, strict=True))
        self.new: list[list[int]] = [[] for _ in tokens]
        self.log_probabilities: list[list[float]] = [[] for _ in tokens]
        self.ended = ["length"] * len(tokens)

    @property
    def running(self) -> bool:
        return "length" in self.ended

    def append(self, chosen: Int[Tensor, " row"], log_probability: Float[Tensor, "row token"]) -> None:
        running = torch.tensor([why == "length" for why in self.ended], device=chosen.device)
        chosen = torch.where(running, chosen, torch.zeros_like(chosen))
        picked = log_probability.gather(-1, chosen[:, None])[:, 0].tolist()
        for row, (token, value) in enumerate(zip(chosen.tolist(), picked, strict=True)):
            if self.ended[row] == "length":
                self.new[row].append(token)
                self.log_probabilities[row].append(value)
                self.ended[row] = self._why(row, token)
        self.tokens = torch.cat([self.tokens, chosen[:, None]], 1)
        self.mask = torch.cat([self.mask, running[:, None]], 1)

    def _why(self, row: int, token: int) -> str:
        if token in self.ends:
            return "end"
        if token in self.stop_ids:
            return "stop"
        if self.stop_texts and self.tokenizer.decode(self.new[row]).endswith(self.stop_texts):
            return "stop"
        return "length"

    def _text(self, prompt: tuple[int, ...], new: list[int]) -> str:
        """New tokens as text. Decoded behind the prompt where that only adds to it: some tokenizers drop a leading blank."""
        before = self.tokenizer.decode(list(prompt), skip_special_tokens=True)
        both = self.tokenizer.decode([*prompt, *new], skip_special_tokens=True)
        return both[len(before) :] if both.startswith(before) else self.tokenizer.decode(new, skip_special_tokens=True)

    def done(self) -> Generation:
        texts = () if self.tokenizer is None else tuple(map(self._text, self.prompts, self.new))
        return Generation(
            prompts=self.prompts,
            tokens=tuple(map(tuple, self.new)),
            texts=texts,
            log_probabilities=tuple(map(tuple, self.log_probabilities)),
            ended=tuple(self.ended),
        )


def _end_tokens(hf: Any) -> set[int]:
    for holder in (getattr(hf, "generation_config", None), hf.config):
        given = getattr(holder, "eos_token_id", None)
        if given is not None:
            return {given} if isinstance(given, int) else set(given)
    return set()
