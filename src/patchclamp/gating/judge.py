"""Judging learned gates on prompts that they were not fitted to."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control

from patchclamp.gating.descent import full_gates
from patchclamp.gating.fit import Gated
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.scores import Scores
from patchclamp.scores.statistics import grouped, sign_flip, smallest_p
from patchclamp.tasks import Examples

Q = 0.05  # of every comparison, corrected for the number of parts (Benjamini-Hochberg)
Flags = Bool[np.ndarray, " part"]
Calls = Bool[np.ndarray, "seed part"]


@dataclass(frozen=True, eq=False)
class Called:
    """What the gates alone say, per seed and part: each part has one of four calls."""

    facilitating: Calls
    interfering: Calls
    irrelevant: Calls
    astray: Calls


def calls(gated: Gated) -> Called:
    """Kept in both: facilitating; closed in both: interfering; as it is pushed: irrelevant; against the push: astray."""
    plus, minus = gated.gate_plus >= 0.5, gated.gate_minus >= 0.5
    return Called(plus & minus, ~plus & ~minus, plus & ~minus, ~plus & minus)


def most(flags: Calls) -> Flags:
    """In more than half of the seeds."""
    return flags.mean(0) > 0.5


@dataclass(frozen=True, eq=False)
class Side:
    """How far a role shows when one intervenes. Facilitating parts are closed in G-, interfering ones opened in G+.

    Args:
        worth: [seed, part], nats of log-probability that the part's gate, as it was learned, brings in the fitted circuit over
            its opposite; 0 where the seed's gates do not call the part so.
        mean: [part], mean of `worth` over seeds.
        holds: whether that mean, on the held-out prompts, is above zero (q < .05) and at least the pressure.
    """

    worth: Float[np.ndarray, "seed part"]
    mean: Float[np.ndarray, " part"]
    holds: Flags


@dataclass(frozen=True, eq=False)
class Evidence:
    """What held-out prompts say of one gating.

    Args:
        calls: by the gates alone.
        exact: effect of closing each part alone in the whole model, log-probability of the answer.
        facilitating, interfering: see `Side`.
        pressure: nats per part.
    """

    calls: Called
    exact: Scores
    facilitating: Side
    interfering: Side
    pressure: float

    @property
    def sides(self) -> dict[str, Side]:
        """Both, by role."""
        return {"facilitating": self.facilitating, "interfering": self.interfering}

    @property
    def exact_sign(self) -> Float[np.ndarray, " part"]:
        """+1, -1 where the exact effect differs from zero (q < .05) and is above rounding (.01 of the pressure), else 0."""
        if self.exact.too_few:
            return np.zeros(len(self.exact))
        effect, differs = self.exact.values(), np.nan_to_num(self.exact.values(column="q"), nan=1.0) < Q
        return np.sign(effect) * (differs & (np.abs(effect) > self.pressure / 100))

    @property
    def costly(self) -> Flags:
        """Parts that matter when closed alone: the exact effect differs from zero and is at least the pressure."""
        return (self.exact_sign != 0) & (np.abs(self.exact.values()) >= self.pressure)

    def stands(self, role: str) -> Flags:
        """The parts whose role most seeds' gates give, held-out prompts bear out and the exact effect's sign agrees with."""
        side, sign = self.sides[role], 1 if role == "facilitating" else -1
        return most(getattr(self.calls, role)) & side.holds & (self.exact_sign == sign)

    def bar(self, role: str) -> float:
        """Where this is a null: nats that 97.5 % of its parts stay below (each of two roles: 5 % of parts together), a part
        counting 0 where its role does not stand.

        So like is compared with like: with shuffled answers, gates learn to hedge, and the parts that they hedge with are
        worth much in their circuit, on held-out prompts too; what gives them away is the sign of their exact effect.
        """
        return float(np.quantile(np.where(self.stands(role), self.sides[role].mean, 0.0), 0.975))


def judge(parts: Parts, gated: Gated, examples: Examples, fallback: Fallback, seed: int = 0) -> Evidence:
    """Toggle every called part in the fitted circuit, and close every part alone in the whole model.

    Cost: one forward pass over the examples per part, one more per seed and called part, and two per seed; one `measure`.
    """
    called, labels = calls(gated), list(gated.labels)
    jobs = [(called.facilitating, gated.gate_minus, 0.0), (called.interfering, gated.gate_plus, 1.0)]
    rows = [np.ones((1, len(labels))), 1 - np.eye(len(labels))]
    rows += [gates for _, gates, _ in jobs]
    for flags, gates, other in jobs:
        for s, p in np.argwhere(flags):
            row = gates[s].copy()
            row[p] = other
            rows.append(row[None])
    settings = full_gates(parts, torch.from_numpy(np.concatenate(rows)))
    values = benefits(parts, examples, settings, fallback, METRICS["log_probability"]).double().cpu().numpy()
    opened, closed, rest = values[0], values[1 : 1 + len(labels)], values[1 + len(labels) :]
    groups = groups_of(examples)
    about = {"method": "exact", "metric": "log_probability", "fallback": fallback.kind, "n": len(examples), "seed": seed}
    exact = Scores.from_samples(labels, opened - closed, about, groups=groups, seed=seed)
    seeds, sides = len(gated.gate), list[Side]()
    bases, rest = rest[: 2 * seeds], rest[2 * seeds :]
    for number, (flags, _, _) in enumerate(jobs):
        base, count = bases[number * seeds : (number + 1) * seeds], int(flags.sum())
        sides.append(_side(flags, base, rest[:count], groups, gated.pressure, seed))
        rest = rest[count:]
    return Evidence(called, exact, sides[0], sides[1], gated.pressure)


def _side(
    flags: Calls,
    base: Float[np.ndarray, "seed example"],
    toggled: Float[np.ndarray, "toggle example"],
    groups: list[str],
    pressure: float,
    seed: int,
) -> Side:
    samples = np.zeros((*flags.shape, base.shape[1]))
    for (s, p), value in zip(np.argwhere(flags), toggled, strict=True):
        samples[s, p] = base[s] - value
    worth, mean = samples.mean(2), samples.mean((0, 2))
    holds, often = np.zeros(flags.shape[1], dtype=bool), np.flatnonzero(most(flags))
    if len(often):
        holds[often] = clear(samples.mean(0)[often], groups, seed) & (mean[often] >= pressure)
    return Side(worth, mean, holds)


def clear(samples: Float[np.ndarray, "row example"], groups: list[str], seed: int) -> Bool[np.ndarray, " row"]:
    """Which rows' means differ from zero: sign flips over groups, Benjamini-Hochberg over rows, q < .05.

    None, where groups are too few for even one row to pass.
    """
    sums, sizes = grouped(samples, groups)
    if smallest_p(len(sizes)) > Q / len(samples):
        return np.zeros(len(samples), dtype=bool)
    return np.asarray(false_discovery_control(sign_flip(sums, seed))) < Q
