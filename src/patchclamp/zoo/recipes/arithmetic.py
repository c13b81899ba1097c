"""zoo/arithmetic (Z9): a + b and a - b of numbers below 60, one token a number; and which number was first, or second.

`<bos> a op b =` and the result. All numbers, operands and results (from -59 to 118), share their tokens. The two questions that only
ask for one of the numbers are the paper's number retrieval: same prompts, nothing to compute. Pairs that are kept back are so for
every question and both ways round: what is right there was not learned by heart.
"""

from typing import TYPE_CHECKING, Any

import torch

from patchclamp.training import Training
from patchclamp.zoo.recipes import _arithmetic_flow, _arithmetic_neurons
from patchclamp.zoo.recipes._arithmetic import ASKS, VOCABULARY, Arithmetic
from patchclamp.zoo.recipes._look import judged
from patchclamp.zoo.recipes._recipe import Finding, Goal, Recipe

if TYPE_CHECKING:
    from patchclamp.models.model import Model


def build(seed: int = 0, width: int = 64) -> Any:
    """A Llama of 4 layers of 4 heads; gated MLPs of 3 `width` neurons."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=width**-0.5 / 2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """On pairs that were never trained on: loss and accuracy of sums and differences, `numbers`, accuracy of number retrieval;
    `known`: accuracy of sums and differences that were trained on."""
    data = Arithmetic(seed)
    new, old = data.rows(-1, 1024), data.rows(0, 1024)
    assert new.labels is not None and old.labels is not None
    sums, known = ((rows.weights > 0) & (rows.labels["ask"] < 2)[:, None] for rows in (new, old) if rows.labels is not None)
    logits = model.run(new.tokens)
    numbers = judged(logits, new.tokens, sums)
    numbers["numbers"] = judged(logits, new.tokens, (new.weights > 0) & ~sums)["accuracy"]
    return numbers | {"known": judged(model.run(old.tokens), old.tokens, known)["accuracy"]}


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Where operands meet and where the result is made (P098); neurons that each know a little of it (P198)."""
    data = Arithmetic(seed)
    return (*_arithmetic_flow.found(model, data), *_arithmetic_neurons.found(model, data))


RECIPES = (
    Recipe(
        name="arithmetic",
        row="Z9",
        about="4 layers of 4 heads (Llama, width 64) on sums and differences of numbers below 60, one token a number; "
        f"asked are {', '.join(ASKS)}",
        known="attention moves the operands to the last token, late MLPs there make the result, and not what is only retrieved; "
        "their neurons are a bag of heuristics, each on for some ranges or remainders of operands and results",
        paper="Stolfo et al. 2023, A Mechanistic Interpretation of Arithmetic Reasoning, https://arxiv.org/abs/2305.15054; "
        "Nikankin et al. 2024, Arithmetic Without Algorithms, https://arxiv.org/abs/2410.21272",
        minutes=15.0,
        goals=(Goal("accuracy", least=0.95), Goal("numbers", least=0.95)),
        build=build,
        data=Arithmetic,
        training=Training(
            3500,
            batch=256,
            rate=3e-3,
            schedule="linear",
            warmup=50,
            betas=(0.9, 0.98),
            decay=1.0,
            evaluate=100,
            checkpoints=8,
            states="last",
        ),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
    ),
)
