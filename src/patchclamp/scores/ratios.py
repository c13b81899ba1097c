"""Ratios of means: which share of a span something is, with one bootstrap over groups behind every interval.

The faithfulness of a circuit C, everywhere in Patchclamp, with m the benefit, mean over examples:

    f(C) = (m(C) - m(nothing open)) / (m(everything open) - m(nothing open))

completeness = 1 - f(everything but C); minimality of a part u of C = f(C) - f(C without u).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from patchclamp.errors import MetricError
from patchclamp.scores.statistics import Interval, names_of

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares of the span between two ends, of means over examples.

    Args:
        opened: by example, the end that is share 1 (every part open).
        closed: by example, the end that is share 0 (every part closed).
        weights: [draw, example], how often each example is in each bootstrap draw of groups.
        groups: how many there are; with fewer than 2, nothing has an interval.
    """

    opened: Float[np.ndarray, " example"]
    closed: Float[np.ndarray, " example"]
    weights: Float[np.ndarray, "draw example"]
    groups: int

    @classmethod
    def of(
        cls,
        opened: Float[np.ndarray, " example"],
        closed: Float[np.ndarray, " example"],
        groups: Sequence[object] | None = None,
        *,
        metric: str = "the metric",
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> "Shares":
        """With `resamples` bootstrap draws of groups (of examples, where no groups are named).

        Raises:
            MetricError: both ends are the same, so that there is no span.
        """
        if abs(float((opened - closed).mean())) < 1e-9:
            raise MetricError(
                f"closing every part leaves {metric} at {float(opened.mean()):.3g}: there is no behaviour to keep. Choose prompts, "
                "a metric or a fallback under which the behaviour goes away"
            )
        names = names_of(groups) or [str(number) for number in range(len(opened))]
        kinds, member = np.unique(names, return_inverse=True)
        counts = np.random.default_rng(seed).multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), size=resamples)
        return cls(opened, closed, counts[:, member].astype(np.float64), len(kinds))

    @property
    def span(self) -> float:
        """mean(opened) - mean(closed)."""
        return float((self.opened - self.closed).mean())

    def point(self, values: Float[np.ndarray, "*setting example"]) -> Float[np.ndarray, "*setting"]:
        """Ratio of means: (mean(values) - mean(closed)) / span."""
        return np.asarray((values - self.closed).mean(-1) / self.span)

    def draws(self, values: Float[np.ndarray, "setting example"]) -> Float[np.ndarray, "draw setting"]:
        """The ratio of means in every bootstrap draw."""
        return self._drawn(values - self.closed)

    def interval(self, values: Float[np.ndarray, " example"]) -> Interval:
        """The ratio of means with its 95 % percentile interval."""
        low, high = self._ends((values - self.closed)[None])
        return Interval(float(self.point(values)), low, high, len(values))

    def difference(self, more: Float[np.ndarray, " example"], less: Float[np.ndarray, " example"]) -> Interval:
        """(mean(more) - mean(less)) / span with its interval."""
        low, high = self._ends((more - less)[None])
        return Interval(float((more - less).mean() / self.span), low, high, len(more))

    def each(
        self, values: Float[np.ndarray, "setting example"]
    ) -> tuple[Float[np.ndarray, " setting"], Float[np.ndarray, " setting"], Float[np.ndarray, " setting"], int]:
        """Mean of ratios: over examples, of each one's own, with both ends of its interval, and how many examples have none.

        An example has no ratio where its span is below a hundredth of the mean one: such a ratio says only that it is small.
        """
        span = self.opened - self.closed
        sound = np.abs(span) >= 0.01 * abs(self.span)
        ratios = (values - self.closed)[:, sound] / span[sound]
        some = self.weights[:, sound]
        drawn = (some @ ratios.T) / np.maximum(some.sum(1), 1e-12)[:, None]
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        return ratios.mean(1), low, high, int((~sound).sum())

    def _drawn(self, apart: Float[np.ndarray, "setting example"]) -> Float[np.ndarray, "draw setting"]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.weights @ apart.T) / (self.weights @ (self.opened - self.closed))[:, None]

    def _ends(self, apart: Float[np.ndarray, "1 example"]) -> tuple[float | None, float | None]:
        if self.groups < 2:
            return None, None
        low, high = np.nanpercentile(self._drawn(apart)[:, 0], [2.5, 97.5])
        return float(low), float(high)
