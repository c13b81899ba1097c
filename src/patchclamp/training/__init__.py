"""Training: any causal LM, on any rows of tokens, with clamps while it learns.

    from patchclamp.training import Training, begin, texts, train

    model = begin({"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 128}, tokenizer="gpt2", seed=0)
    data = texts("shakespeare.txt", model.tokenizer, length=128, held=0.05)
    run = train(model, data, Training(steps=1000, batch=32), out="runs/shakespeare")

A page of code over torch and transformers, not a framework. What a run's numbers depend on is its `Training`, its data, its
clamps and the model it began with: the same again, killed or not, ends in the same weights.
"""

from patchclamp.training.clamp import Clamp
from patchclamp.training.cost import Estimate, estimate
from patchclamp.training.data import Data, Rows
from patchclamp.training.lora import lora
from patchclamp.training.loss import held_out, next_token
from patchclamp.training.metrics import read as read_metrics
from patchclamp.training.plan import Training, log_spaced
from patchclamp.training.start import begin
from patchclamp.training.texts import Tokens, texts
from patchclamp.training.trainer import Trained, train

__all__ = [
    "Clamp",
    "Data",
    "Estimate",
    "Rows",
    "Tokens",
    "Trained",
    "Training",
    "begin",
    "estimate",
    "held_out",
    "log_spaced",
    "lora",
    "next_token",
    "read_metrics",
    "texts",
    "train",
]
