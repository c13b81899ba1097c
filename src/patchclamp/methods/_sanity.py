"""Do a method's scores depend on what the model has learned? Weights are shuffled from the top down (Adebayo et al. 1810.03292; P009).

Usually a map that changes little when layers are randomised is held against the method. P009 shows why that is not enough: a map that
says nothing at all changes completely, and what randomisation leaves (the scale of activations) keeps honest maps alike. So beside the
similarity to the original scores stands, at every step, the agreement with the exact effects *of that model*: a method that follows the
model agrees with it whatever the similarity, one that knows nothing does not, however quickly its maps change.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from patchclamp.methods import effects
from patchclamp.methods._agreement import against, signed
from patchclamp.metrics import Metric
from patchclamp.models.model import Model
from patchclamp.parts import Parts
from patchclamp.tasks import Examples


def randomised(model: Model, layers: Sequence[int], seed: int = 0) -> Model:
    """The same model with each weight matrix of some blocks shuffled entry by entry, which keeps its scale; biases and norms stay."""
    hf = deepcopy(model.hf)
    generator, path = torch.Generator().manual_seed(seed), _paths(model)
    with torch.no_grad():
        for layer in sorted(layers):
            for weight in hf.get_submodule(path[layer]).parameters():
                if weight.dim() > 1:
                    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                    weight.copy_(weight.flatten()[order].view_as(weight))
    made = Model.load(hf, tokenizer=model.tokenizer)
    return replace(made, name=f"{model.name} with {len(layers)} layers shuffled")


def _paths(model: Model) -> list[str]:
    names = {id(module): name for name, module in model.hf.named_modules()}
    return [names[id(layer.block)] for layer in model.anatomy.layers]


def sanity(
    parts: Parts,
    examples: Examples,
    fallback: str,
    methods: Sequence[str] = ("gradient", "integrated", "random"),
    *,
    metric: str | Metric | None = None,
    fit: Examples | None = None,
    top: int = 5,
    seed: int = 0,
) -> pl.DataFrame:
    """Scores of ever more randomised models: none, the last block, the last two, ..., all of them.

    Args:
        parts: which parts, of the model as it is.
        examples: on which prompts.
        fallback: the rule's name, made anew for every model.
        methods: which.
        metric: by default the task's.
        fit: what a mean is learned on.
        top: of how many parts the overlap is taken.
        seed: of the shuffles, and of methods that draw.

    Returns:
        A row per method and number of shuffled layers: `similarity` (Spearman, of |score| with the method's own on the model as it is),
        `exact_similarity` (the same of exact effects: what a right method would show), `agreement` (Spearman of the scores with that
        model's exact effects, signs and all) and `overlap` of the top parts with those. A `random` that is drawn once for all models
        shows similarity 1 and agreement near 0.

    Cost: as many times exact and every method as there are layers, and once more.
    """
    layers = parts.model.layers
    rows: list[dict[str, object]] = []
    first: dict[str, NDArray[np.float64]] = {}
    for shuffled in range(layers + 1):
        model = parts.model if not shuffled else randomised(parts.model, range(layers - shuffled, layers), seed)
        here = parts if not shuffled else parts.on(model)
        rule = here.fallback(fallback, fit)
        scores = {
            name: effects(here, examples, rule, name, metric=metric, seed=seed).double().mean(1).numpy()
            for name in dict.fromkeys(("exact", *methods))
        }
        first = first or scores
        alike = {name: against(np.abs(score), np.abs(first[name]), top)["spearman"] for name, score in scores.items()}
        for name in methods:
            true = scores["exact"] if signed(name) else np.abs(scores["exact"])
            agrees = against(scores[name], true, top)
            rows.append({
                "method": name, "shuffled": shuffled, "similarity": alike[name], "exact_similarity": alike["exact"],
                "agreement": agrees["spearman"], "overlap": agrees["overlap"],
            })  # fmt: skip
    return pl.DataFrame(rows)
