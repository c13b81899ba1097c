"""Codes: heads whose output takes other discrete values where a behaviour is present than where it is absent, from a few pairs.

    code(head, prompt) = the cluster of what the head writes at a position, among all prompts (complete linkage: no two outputs of
                         one cluster are further apart than `radius` times the head's own typical size)
    score(head)        = share of positive prompts whose code no negative prompt has
    p(head)            = share of the ways to swap the two prompts of each pair that score as high

Five to ten pairs and one forward pass are enough, and nothing is closed (O'Neill & Bui 2024, https://arxiv.org/abs/2405.12522, whose
codes are the largest of the latents of an autoencoder that is fitted to all heads' outputs; here outputs are quantised directly,
so that there is nothing to fit and no seed). Positive and negative prompts of a pair are to share all but the behaviour: then a
head that writes of the content alone has the same code for both.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError, TaskError
from patchclamp.models.model import Model
from patchclamp.scores import Part, Scores
from patchclamp.sites import Site
from patchclamp.tasks import Examples

FLIPS = 4096
"""Up to 12 pairs every way of swapping is tried, beyond, so many drawn at random."""
TINY = 1e-6
"""Outputs below this share of the largest head's are nothing at all."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Discrete codes of heads.

    Args:
        scores: a row per head: score, p, and how many distinct codes it has on positive and on negative prompts.
        codes: [head, prompt], positive prompts first: numbers that are comparable within a head.
    """

    scores: Scores
    codes: Int[np.ndarray, "head prompt"]

    def circuit(self, least: float = 0.5, p: float = 0.05) -> Circuit:
        """The heads with at least this score, and a p no larger than this."""
        table = self.scores.table
        chosen = table.filter((table["score"] >= least) & (table["p"] <= p))["site"].to_list()
        return Circuit(chosen, {**self.scores.about, "least": least, "p": p, "size": len(chosen), "of": table.height})


@dataclass(frozen=True)
class Recovery:
    """How well a circuit matches one that is known."""

    precision: float
    recall: float

    @classmethod
    def of(cls, found: Circuit, known: Circuit) -> "Recovery":
        """Precision of an empty circuit is 1: nothing wrong is in it."""
        both = len(found & known)
        return cls(both / len(found) if len(found) else 1.0, both / len(known) if len(known) else 1.0)


def codes(model: Model, examples: Examples, *, at: int | str = "end", radius: float = 0.5, seed: int = 0) -> Codes:
    """Heads by how many positive prompts have codes of their own.

    Args:
        model: the model.
        examples: a few pairs; the clean prompt shows the behaviour, the corrupt one does not.
        at: the position or named span (its mean) that heads are looked at.
        radius: of a code, in units of the root mean square length of what the head writes.
        seed: of the swaps, where there are more than 12 pairs.

    Cost: two forward passes over the pairs, and clustering: seconds.

    Raises:
        TaskError: examples without corrupt prompts.
        PatchclampError: fewer than 3 pairs, or a radius that is not above 0.
    """
    if len(examples) < 3 or not radius > 0:
        raise PatchclampError(
            f"codes of {len(examples)} pairs at a radius of {radius} were asked for: give 3 or more, and a radius above 0"
        )
    if examples[0].corrupt is None:
        raise TaskError(f"codes compare prompts with and without a behaviour, and {examples.task!r} has no corrupt prompts")
    sites = [Site("write", layer, head) for layer, sizes in enumerate(model.anatomy.sizes) for head in range(sizes.heads)]
    batch = examples.batch()
    where = batch.columns(at).to(model.device)[:, :, None]
    rows = batch.sign > 0  # a wrong answer's row repeats its prompt
    outputs = {site: list[torch.Tensor]() for site in sites}
    for one in (batch, batch.swapped()):
        with torch.no_grad():
            kept = model.record(one, sites)
        for site, value in kept.items():
            mean = (value * where).sum(1) / where.sum(1)
            outputs[site].append(mean[rows.to(mean.device)].double().cpu())
    values = [torch.cat(outputs[site]).numpy() for site in sites]
    sizes = np.array([np.sqrt((value**2).sum(1).mean()) for value in values])
    found = np.stack(
        [
            _clusters(value, radius * size if size > TINY * sizes.max() else np.inf)
            for value, size in zip(values, sizes, strict=True)
        ]
    )
    n = len(examples)
    flips = _flips(n, seed)
    scores, p = zip(*(_scored(row, n, flips) for row in found), strict=True)
    heads: list[Part] = [Site("head", site.layer, site.index) for site in sites]
    about = {"method": "codes", "at": str(at), "radius": radius, "n": n, "seed": seed, "model": model.name, "task": examples.task}
    return Codes(
        Scores.of(heads, list(scores), about, p=list(p), positive=[len(set(row[:n])) for row in found],
                  negative=[len(set(row[n:])) for row in found]),
        found,
    )  # fmt: skip


def _clusters(values: Float[np.ndarray, "prompt width"], apart: float) -> Int[np.ndarray, " prompt"]:
    """Numbers of clusters in which no two are further apart than `apart`."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if not np.isfinite(apart):
        return np.ones(len(values), dtype=np.int64)
    return fcluster(linkage(values, "complete"), apart, "distance").astype(np.int64)


def _flips(n: int, seed: int) -> Float[np.ndarray, "way pair"]:
    """Which pairs are swapped: every way of up to 12, the first being none; beyond, none and so many drawn."""
    if 2**n <= FLIPS:
        return np.array(list(product((False, True), repeat=n))).astype(float)
    drawn = np.random.default_rng([seed, 19]).random((FLIPS, n)) < 0.5
    drawn[0] = False
    return drawn.astype(float)


def _scored(row: Int[np.ndarray, " prompt"], n: int, flips: Float[np.ndarray, "way pair"]) -> tuple[float, float]:
    """Share of positives whose code no negative has, and of the ways to swap pairs those that reach it."""
    kinds, member = np.unique(row, return_inverse=True)
    one_hot = (member[:, None] == np.arange(len(kinds))).astype(float)
    positive, negative = one_hot[:n], one_hot[n:]
    on_positive = flips @ (negative - positive) + positive.sum(0)
    on_negative = flips @ (positive - negative) + negative.sum(0)
    shares = np.where(on_negative < 0.5, on_positive, 0.0).sum(1) / n
    return float(shares[0]), float((shares >= shares[0] - 1e-9).mean())
