"""zoo/small: a Llama of under a million weights that solves nine of the built-in tasks.

    python -m patchclamp.zoo.recipes.small --out FOLDER

Trains from random weights on text that the tasks themselves give (`_texts`). What is learned least gets the most text: after
every 100 updates each task's share is set by its accuracy on word combinations that are never trained on. When the tasks are
known, the course begins: lessons that lead to coloured objects, one after the other, beside the tasks. (From its prompts
alone that task stays at chance, and so it does when the lessons are mixed in from the first update.) When coloured objects
too have reached the goal, or time is up, the learning rate falls to zero over the last updates. An interrupted training
continues from its last checkpoint and gives the same weights.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchclamp.metrics import METRICS
from patchclamp.tasks import Examples
from patchclamp.zoo.recipes._texts import ANSWER_WEIGHT, LESSONS, Row, heard, rows, unseen_examples
from patchclamp.zoo.recipes._words import BOS, EOS, PAD, word_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TASKS = ("ioi", "greater_than", "induction", "gendered_pronoun", "agreement", "capitals", "addition", "name_recall")
LAST = "coloured_objects"  # what the course leads to
COURSE = (*LESSONS, LAST)
OPTIONAL = ("addition",)  # training does not wait for these


@dataclass(frozen=True)
class Recipe:
    """Every number of the training."""

    seed: int = 0
    layers: int = 4
    heads: int = 8
    width: int = 128
    mlp: int = 256
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.05
    every: int = 100
    most: int = 5000
    last: int = 400
    goal: float = 0.97
    lesson_goal: float = 0.9


@dataclass
class State:
    """Where a training stands; written beside the weights at every checkpoint."""

    step: int = 0
    stop: int = 0
    course: int = -1  # how many of the course's steps are known; -1: not begun
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict[str, float])


def build(recipe: Recipe, words: int) -> "LlamaForCausalLM":
    """The model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=words, hidden_size=recipe.width, intermediate_size=recipe.mlp, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, max_position_embeddings=128,
        rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        initializer_range=0.04, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_of(model: "LlamaForCausalLM", lines: Sequence[Row]) -> Tensor:
    """Weighted mean of the next-token losses. Rows are padded on the right, where causal attention never looks back from."""
    width = max(len(line.tokens) for line in lines)
    tokens = torch.tensor([[*line.tokens, *[PAD] * (width - len(line.tokens))] for line in lines])
    weights = torch.tensor([[*line.weights, *[0.0] * (width - len(line.weights))] for line in lines])[:, 1:]
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def accuracy_of(model: "LlamaForCausalLM", examples: Examples) -> float:
    """Share of examples whose logit difference is above 0."""
    right = 0
    for batch in examples.batches(100):
        out = model(input_ids=batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids, use_cache=False)
        logits = out.logits[batch.target_row, batch.target_position]
        right += int((METRICS["logit_diff"](logits[None], batch) > 0).sum())
    return right / len(examples)


@torch.no_grad()
def knowledge_of(model: "LlamaForCausalLM", lines: Sequence[Row]) -> float:
    """Share of a lesson's answers that the model says first."""
    right = asked = 0
    for line in lines:
        best = model(input_ids=torch.tensor([line.tokens]), use_cache=False).logits[0, :-1].argmax(-1).tolist()
        hits = [best[i - 1] == line.tokens[i] for i in range(1, len(line.tokens)) if line.weights[i] >= ANSWER_WEIGHT / 2]
        right, asked = right + sum(hits), asked + len(hits)
    return right / asked


def shares(accuracy: Mapping[str, float], course: int, count: int) -> dict[str, int]:
    """How many of `count` rows each task and lesson gets.

    The course's present step gets two fifths, the two after it an eighth each, those behind a thirtieth each. Tasks share the
    rest: more, the less of one is known.
    """
    found: dict[str, float] = {}
    if course >= 0:
        found = dict.fromkeys(COURSE[:course], 1 / 30) | dict.fromkeys(COURSE[course + 1 : course + 3], 1 / 8)
        found |= dict.fromkeys(COURSE[course : course + 1], 0.4)
    known = (*TASKS, LAST) if course == len(COURSE) else TASKS
    need = {name: 0.1 + 1 - accuracy.get(name, 0.5) for name in known}
    left, total = 1 - sum(part for name, part in found.items() if name not in need), sum(need.values())
    return {name: round(count * part) for name, part in (found | {n: left * part / total for n, part in need.items()}).items()}


def course_of(recipe: Recipe, state: State) -> int:
    """Where the course stands after new accuracies: it begins when the tasks are known, and never goes back."""
    if state.course < 0 and any(state.accuracy[name] < recipe.goal for name in TASKS if name not in OPTIONAL):
        return state.course
    course = max(state.course, 0)
    while course < len(COURSE) and state.accuracy[COURSE[course]] >= recipe.lesson_goal:
        course += 1
    return course


def rate_at(recipe: Recipe, state: State) -> float:
    """Up over the warm-up, then level, then down to zero over the last updates before `stop`."""
    left = (state.stop - state.step) / recipe.last if state.stop else 1.0
    return recipe.rate * min(1.0, (state.step + 1) / recipe.warmup, left)


def train(recipe: Recipe, out: Path) -> State:
    """Train, or go on training, until done; leaves config, weights, tokenizer and README in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, out)
    model = build(recipe, len(tokenizer))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    state = _resume(out, model, optimizer)
    asides = {name: unseen_examples(name, tokenizer) for name in (*TASKS, LAST)}
    lessons = {name: rows({name: 50}, tokenizer, f"{recipe.seed}/aside") for name in LESSONS}
    while not state.stop or state.step < state.stop:
        begun = time.monotonic()
        loss = _stretch(recipe, model, optimizer, tokenizer, state)
        model.eval()
        state.accuracy = {name: accuracy_of(model, examples) for name, examples in asides.items()}
        state.accuracy |= {name: knowledge_of(model, lines) for name, lines in lessons.items()}
        state.course = course_of(recipe, state)
        state.seconds += time.monotonic() - begun
        done = all(state.accuracy[name] >= recipe.goal for name in asides if name not in OPTIONAL)
        if not state.stop and (done or state.step + recipe.last >= recipe.most):
            state.stop = state.step + recipe.last
        _keep(out, model, optimizer, state)
        known = "  ".join(f"{name} {value:.0%}" for name, value in state.accuracy.items())
        print(f"{state.step:5d}  {state.seconds / 60:5.1f} min  loss {loss:.3f}  {known}", flush=True)
    _ship(recipe, out, model, state)
    return state


def _tokenizer(recipe: Recipe, out: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in `out`, made first where there is none: a training that goes on keeps its vocabulary."""
    from transformers import PreTrainedTokenizerFast

    if not (out / "tokenizer.json").exists():
        word_tokenizer(heard((*TASKS, LAST), recipe.seed)).save_pretrained(out)
    return PreTrainedTokenizerFast.from_pretrained(out)


def _stretch(
    recipe: Recipe,
    model: "LlamaForCausalLM",
    optimizer: torch.optim.Optimizer,
    tokenizer: "PreTrainedTokenizerFast",
    state: State,
) -> float:
    """The updates between two checkpoints; text depends on the seed, the step and the accuracies alone."""
    model.train()
    lines = rows(shares(state.accuracy, state.course, recipe.every * recipe.batch), tokenizer, f"{recipe.seed}/{state.step}")
    total = 0.0
    for at in range(recipe.every):
        chosen = sorted(lines[at :: recipe.every], key=lambda line: len(line.tokens))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, state)
        optimizer.zero_grad()
        half = len(chosen) // 2  # short rows and long rows apart: less padding
        for part in (chosen[:half], chosen[half:]):
            loss = loss_of(model, part) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state.step += 1
    return total / recipe.every


def _keep(out: Path, model: "LlamaForCausalLM", optimizer: torch.optim.Optimizer, state: State) -> None:
    """Weights and the optimizer's moments in one file, written whole or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    save_file(tensors, out / "checkpoint.tmp", metadata={"state": json.dumps(asdict(state))})
    (out / "checkpoint.tmp").replace(out / "checkpoint.safetensors")


def _resume(out: Path, model: "LlamaForCausalLM", optimizer: torch.optim.Optimizer) -> State:
    """Load the last checkpoint into `model` and `optimizer`; a new state where there is none."""
    from safetensors import safe_open

    file = out / "checkpoint.safetensors"
    if not file.exists():
        return State()
    tensors = load_file(file)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model.load_state_dict(weights, strict=False)  # the unembedding is tied, so it is not stored
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    with safe_open(file, "pt") as opened:
        return State(**json.loads(cast(dict[str, str], opened.metadata())["state"]))


def _ship(recipe: Recipe, out: Path, model: "LlamaForCausalLM", state: State) -> None:
    """The files that go into the package."""
    model.eval().save_pretrained(out)
    table = "\n".join(f"| {name} | {value:.1%} |" for name, value in state.accuracy.items() if name not in LESSONS)
    (out / "README.md").write_text(
        README.format(
            size=sum(p.numel() for p in model.parameters()), table=table, steps=state.step, minutes=state.seconds / 60,
            **asdict(recipe),
        ),
        encoding="utf-8",
    )  # fmt: skip


README = """# zoo/small

A Llama with {layers} layers of {heads} heads, width {width}, {size:,} weights, trained from scratch on text made from
Patchclamp's own tasks: a small world of names, places, gifts, colours, years, capitals, sums and repeated sequences.
It knows nothing else.

Recipe: `python -m patchclamp.zoo.recipes.small --out FOLDER --seed {seed}`; {steps} updates of {batch} rows, {minutes:.0f}
minutes on 2 shared cores. A token is a word with the blank before it, a punctuation mark, or a pair of digits; `<bos>`
goes before every text. Words outside its vocabulary become `<unk>`.

A fifth of all word combinations, chosen by a hash of the prompt's set of words, was never trained on. Accuracy on those
(share of prompts whose logit difference is above 0; up to 200 a task):

| task | accuracy |
|---|---|
{table}
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train zoo/small, or go on training it.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=Recipe.most, help="updates at most")
    given = parser.parse_args()
    torch.set_num_threads(2)
    train(Recipe(seed=given.seed, most=given.most), given.out)


if __name__ == "__main__":
    main()
