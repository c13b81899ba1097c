"""Training: any causal LM, on any rows of tokens, with clamps while it learns.

    from patchclamp.training import Training, train
    run = train(model, data, Training(steps=1000, batch=32), out="runs/induction")

A page of code over torch and transformers, not a framework. What a run's numbers depend on is its `Training`, its data, its
clamps and the model it began with: the same again, killed or not, ends in the same weights.
"""

from patchclamp.training.clamp import Clamp
from patchclamp.training.data import Data, Rows
from patchclamp.training.loss import held_out, next_token
from patchclamp.training.plan import Training, log_spaced
from patchclamp.training.trainer import Trained, train

__all__ = ["Clamp", "Data", "Rows", "Trained", "Training", "held_out", "log_spaced", "next_token", "train"]
