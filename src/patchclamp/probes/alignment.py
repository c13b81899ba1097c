"""Distributed alignment search: a subspace, learned, whose exchange between prompts exchanges the answers.

Geiger et al. 2023, https://arxiv.org/abs/2303.02536. With B's rows orthonormal and learned, and b the benefit (positive where the answer
is right):

    value' = value + B' B (value on the corrupt prompt - value)          interchange intervention
    loss   = mean of log(1 + exp(b(value')))                             the corrupt prompt's answer is wanted

A search that can fit anything finds a subspace where there is none. So it is judged on unseen pairs and beside its controls: labels
dealt out arbitrarily (what the search can make up), an untrained model (what needs no computation), a random subspace of the same rank,
and the whole site (the most that there is to find).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.methods import groups_of
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.model import Model
from patchclamp.parts.slopes import frozen
from patchclamp.probes.subspace import Swap, orthonormal, values_at
from patchclamp.scores.statistics import Interval, mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

CONTROLS = ("arbitrary labels", "untrained model", "random subspace", "whole site")


@dataclass(frozen=True, eq=False)
class Aligned:
    """A learned subspace and how far it is to be believed.

    Attributes:
        site: where it is.
        basis: [rank, width], orthonormal rows.
        accuracy: share of unseen pairs in which the exchange gives the corrupt prompt's answer (interchange intervention accuracy).
        controls: a row for the subspace ("learned") and for each control: fitted (accuracy on the pairs it was learned on), accuracy on
            unseen pairs, low, high.
        about: rank, updates, metric, numbers of pairs, seed.
    """

    site: Site
    basis: Float[Tensor, "rank width"]
    accuracy: Interval
    controls: pl.DataFrame
    about: dict[str, Any]

    @property
    def selectivity(self) -> float:
        """Accuracy on unseen pairs above that with arbitrary labels."""
        return self.accuracy.mean - float(self.controls.filter(pl.col("control") == "arbitrary labels")["accuracy"][0])

    def __str__(self) -> str:
        rows = "; ".join(
            f"{row['control']} {row['accuracy']:.0%} (fitted {row['fitted']:.0%})" for row in self.controls.iter_rows(named=True)
        )
        return f"{self.site}, rank {len(self.basis)}: interchange accuracy on {self.accuracy.n} unseen pairs: {rows}"


def align(
    model: Model,
    fit: Examples,
    unseen: Examples,
    site: Site | str,
    *,
    rank: int = 1,
    updates: int = 100,
    rows: int = 32,
    rate: float = 0.05,
    metric: str | None = None,
    untrained: Model | None = None,
    seed: int = 0,
) -> Aligned:
    """Learn a subspace of a site, and judge it.

    Args:
        model: the model.
        fit: pairs to learn on.
        unseen: pairs to judge on.
        site: where: a site that holds a vector per position, at a position (`L3.resid.post@end`) or at all.
        rank: of the subspace.
        updates: of the descent (Adam).
        rows: pairs in each.
        rate: its step.
        metric: of which the sign says who is right; by default the task's.
        untrained: a model of the same anatomy that was never trained, for that control; left out where it is None.
        seed: of the start, the order and arbitrary labels.

    Cost: `updates` forward and backward passes over `rows` pairs for the subspace, and again for each learned control.

    Raises:
        GateError: no pairs, a rank that the site has not, or a metric that cannot say which answer is right.
    """
    place = Site.parse(site) if isinstance(site, str) else site
    model.anatomy.require(place)
    chosen = metric_named(metric or fit.metric)
    if not chosen.wrong:
        raise GateError(f"{chosen.name} does not say which of two answers is right: use logit_diff, and pairs with 'wrong'")
    for some, name in ((fit, "fit"), (unseen, "unseen")):
        if not len(some) or some[0].corrupt is None:
            raise GateError(f"an alignment exchanges what clean and corrupt prompts hold: the {name} set has no pairs")
    width = values_at(model, fit.batch([0]).to(model.device), place).shape[-1]
    if not 1 <= rank <= width:
        raise GateError(f"a subspace of rank {rank} was asked for at {place}, which has width {width}")
    search = _Search(place, rank, width, updates, rows, rate, chosen, seed)
    plain, some = torch.ones(len(fit)), torch.ones(len(unseen))
    labels = [_arbitrary(len(one), seed + number) for number, one in enumerate((fit, unseen))]
    learned = search.learn(model, fit, plain)
    trials: list[tuple[str, Model, Tensor, Tensor, Tensor]] = [
        ("learned", model, learned, plain, some),
        ("arbitrary labels", model, search.learn(model, fit, labels[0]), labels[0], labels[1]),
    ]
    if untrained is not None:
        trials.append(("untrained model", untrained, search.learn(untrained, fit, plain), plain, some))
    trials.append(("random subspace", model, search.start(seed + 1), plain, some))
    trials.append(("whole site", model, torch.eye(width), plain, some))
    table: list[dict[str, Any]] = []
    for name, where, basis, mine, theirs in trials:
        fitted = search.right(where, fit, basis, mine).double().mean()
        found = mean_interval(search.right(where, unseen, basis, theirs).double().cpu().numpy(), groups_of(unseen), seed=seed)
        table.append({"control": name, "fitted": float(fitted), "accuracy": found.mean, "low": found.low, "high": found.high})
    first = table[0]
    about = {"rank": rank, "updates": updates, "metric": chosen.name, "fit": len(fit), "n": len(unseen), "seed": seed}
    return Aligned(
        place, learned, Interval(first["accuracy"], first["low"], first["high"], len(unseen)), pl.DataFrame(table), about
    )


@dataclass(frozen=True)
class _Search:
    """What a search needs besides a model and its pairs."""

    site: Site
    rank: int
    width: int
    updates: int
    rows: int
    rate: float
    metric: Metric
    seed: int

    def start(self, seed: int) -> Float[Tensor, "rank width"]:
        """A random subspace."""
        return orthonormal(torch.randn(self.rank, self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def learn(self, model: Model, fit: Examples, wanted: Float[Tensor, " example"]) -> Float[Tensor, "rank width"]:
        """Descend; `wanted` is 1 where the exchange is to turn the answer, -1 where it is to keep it."""
        chance = torch.Generator().manual_seed(self.seed)
        vectors = self.start(self.seed).clone().requires_grad_()
        descent = torch.optim.Adam([vectors], lr=self.rate)
        with frozen(model):
            for _ in range(self.updates):
                some = torch.randperm(len(fit), generator=chance)[: self.rows].tolist()
                batch = fit.batch(some).to(model.device)
                with torch.enable_grad():
                    benefit = self.swapped(model, batch, orthonormal(vectors))
                    loss = torch.nn.functional.softplus(wanted[some].to(benefit) * benefit).mean()
                    descent.zero_grad()
                    loss.backward()
                descent.step()
        return orthonormal(vectors.detach())

    def swapped(self, model: Model, batch: Batch, basis: Float[Tensor, "rank width"]) -> Float[Tensor, " example"]:
        """The benefit with the subspace exchanged."""
        other = values_at(model, batch.swapped(), self.site)
        return self.metric.sign * self.metric(model.target_logits(batch, {self.site: Swap(basis, other)}), batch)[0]

    def right(
        self, model: Model, examples: Examples, basis: Float[Tensor, "rank width"], wanted: Float[Tensor, " example"]
    ) -> Tensor:
        """By pair, whether the exchange gives the answer that is wanted."""
        found: list[Tensor] = []
        with torch.no_grad():
            for batch in examples.batches(64):
                found.append(self.swapped(model, batch.to(model.device), basis).cpu())
        return wanted * torch.cat(found) < 0


def _arbitrary(count: int, seed: int) -> Float[Tensor, " example"]:
    """1 or -1 for each pair, half of each."""
    signs: Sequence[float] = [1.0 if number % 2 else -1.0 for number in range(count)]
    return torch.tensor(signs)[torch.randperm(count, generator=torch.Generator().manual_seed(seed + 101))]
