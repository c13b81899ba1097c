"""Switching: which parts have one role always, which are open on some inputs only, on which, and whether that holds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from patchclamp.errors import GateError
from patchclamp.gating.dynamic.features import SHOWN, Feature, Inputs, Probed, inputs_of, phases_of, probe, share_interval
from patchclamp.gating.dynamic.fit import Dynamic
from patchclamp.gating.dynamic.judge import Judged, every_gate
from patchclamp.gating.dynamic.sight import generated, right_rows
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores.statistics import mean_interval
from patchclamp.tasks import Examples

EDGE = 0.05  # a part that is open on fewer inputs than this is closed always; on more than 1 less this, open always
NEGLIGIBLE = 0.1  # closing a part where it is said to be closed may cost this share of what it costs elsewhere


@dataclass(frozen=True, eq=False)
class Switching:
    """What each part's gate does over inputs.

    Args:
        table: a row per part: site; role ("open", "closed", "switches", or "undecided" where seeds differ); open_share with low,
            high over groups of inputs (mean over seeds); seeds (how many give that role); feature, auroc, auroc_low, auroc_high
            (what tells where it is open, on inputs that neither gates nor probe were fitted to), on, off (that feature's values),
            open_inputs, closed_inputs (examples); cost_open, cost_closed with _low, _high and n_open, n_closed (what closing it
            takes, on confirm prompts, at inputs where it is said to be open and closed); verified.
        gates: [part, input], mean over seeds of gates of 0 and 1 on the unseen inputs.
        inputs: the unseen inputs.
        probes: by part, AUROC of every feature.
        strength: which fits these are.
    """

    table: pl.DataFrame
    gates: Float[np.ndarray, "part input"]
    inputs: Inputs
    probes: Mapping[str, Mapping[str, float]]
    strength: float

    def sentences(self) -> list[str]:
        """One sentence per part that is not closed always."""
        return [_sentence(row, len(self.inputs)) for row in self.table.iter_rows(named=True) if row["role"] != "closed"]


def best_strength(judged: Judged) -> float:
    """The strength at which moving gates have the largest advantage over static ones."""
    return float(judged.advantage.sort("difference", descending=True)["strength"][0])


def switching(
    parts: Parts,
    found: Dynamic,
    strength: float,
    fit: Examples,
    select: Examples,
    confirm: Examples,
    fallback: Fallback,
    *,
    named: Mapping[str, Feature] | None = None,
    metric: str = "log_probability",
    seed: int = 0,
) -> Switching:
    """Say of every part where its gate is open, and verify it by intervening.

    Verified means, on confirm prompts: closing the part where it is said to be open costs (interval above 0), and closing it where
    it is said to be closed costs less (intervals apart) and next to nothing: at most a tenth of that, or the price of a gate.
    Where the prompts of either side are of one group, so that there is no interval, nothing is verified.

    Args:
        parts, found, fallback: as fitted.
        strength: which fits (`best_strength`).
        fit: inputs that the probe is fitted to. select: unseen inputs that shares and AUROC are taken on.
        confirm: prompts on which gates are closed.
        named: features of prompts beside those that are always there (`features.inputs_of`).
        metric: what closing costs, in its units.
        seed: of intervals.

    Cost: one forward pass over all three sets per fit, two over `confirm` per switching part.

    Raises:
        GateError: no fit of that strength moves.
    """
    fits = found.pick(True, strength)
    if not fits:
        raise GateError(f"no moving fit has strength {strength}: there are {sorted(set(found.strength.tolist()))}")
    scope = found.sight.scope
    sets = [
        phases_of(examples, named) if scope == "phase" else inputs_of(examples, scope == "token", named)
        for examples in (fit, select)
    ]
    opened = [_opened(parts, found, fits, examples) for examples in (fit, select)]
    price = float(found.price[fits].mean())
    rows: list[dict[str, object]] = []
    probes: dict[str, Mapping[str, float]] = {}
    for number, site in enumerate(found.labels):
        each = opened[1][:, number]
        role, agree = _role(each)
        mean, low, high = share_interval(each.mean(0), sets[1].groups, seed)
        row: dict[str, object] = {"site": str(site), "role": role, "seeds": agree, "open_share": mean, "low": low, "high": high}
        if role == "switches":
            most = [one[:, number].mean(0) > 0.5 for one in opened]
            told = probe(sets[0], most[0], sets[1], most[1], seed)
            probes[str(site)] = told.each
            row |= _told(told, sets[1], most[1])
            row |= _costs(parts, found, fits, number, confirm, fallback, metric, price, seed)
        rows.append(row)
    return Switching(pl.DataFrame(rows, schema=SCHEMA), opened[1].mean(0), sets[1], probes, strength)


_NUMBERS = ("open_share", "low", "high", "auroc", "auroc_low", "auroc_high", "cost_open", "cost_open_low", "cost_open_high",
            "cost_closed", "cost_closed_low", "cost_closed_high")  # fmt: skip
SCHEMA: dict[str, "type[pl.DataType] | pl.List"] = {
    "site": pl.String, "role": pl.String, "seeds": pl.Int64, **dict.fromkeys(_NUMBERS[:3], pl.Float64), "feature": pl.String,
    **dict.fromkeys(_NUMBERS[3:6], pl.Float64), "on": pl.List(pl.String), "off": pl.List(pl.String),
    "open_inputs": pl.List(pl.String), "closed_inputs": pl.List(pl.String), **dict.fromkeys(_NUMBERS[6:], pl.Float64),
    "n_open": pl.Int64, "n_closed": pl.Int64, "verified": pl.Boolean,
}  # fmt: skip
"""Columns of `Switching.table`."""


def _opened(parts: Parts, found: Dynamic, fits: list[int], examples: Examples) -> Float[np.ndarray, "fit part input"]:
    """Gates of 0 and 1 on every input: prompts, prompts' tokens in order, or each prompt and what was generated behind it."""
    rows: list[np.ndarray] = []
    controllers = [found.controller(number) for number in fits]
    for batch in examples.batches(64):
        gates, _ = every_gate(parts, controllers, batch)
        mine = gates[..., [parts.labels.index(site) for site in found.labels]]
        if found.sight.scope == "phase":  # alike on all tokens of a phase: that of its first
            behind = generated(batch).to(gates.device) & batch.mask.to(gates.device)
            prompt = batch.mask.to(gates.device) & ~behind
            first = torch.stack([prompt.long().argmax(1), behind.long().argmax(1)], 1)[right_rows(batch, "phase")]
            both = torch.stack([prompt.any(1), behind.any(1)], 1)[right_rows(batch, "phase")]
            rows.append(
                mine.gather(2, first[None, :, :, None].expand(len(mine), -1, -1, mine.shape[-1]))[:, both]
                .transpose(1, 2)
                .cpu()
                .numpy()
            )
        elif found.sight.scope == "token":
            ends = batch.spans["end"][:, 1:].to(gates.device)
            real = batch.mask.to(gates.device) & (torch.arange(batch.mask.shape[1], device=gates.device) < ends)
            rows.append(mine[:, real].transpose(1, 2).cpu().numpy())
        else:
            rows.append(mine[:, :, 0].transpose(1, 2).cpu().numpy())
    return np.concatenate(rows, 2).astype(float)


def _role(opened: Float[np.ndarray, "fit input"]) -> tuple[str, int]:
    """The role that more than half of the fits give, and how many do."""
    share = opened.mean(1)
    votes = {"open": share > 1 - EDGE, "closed": share < EDGE, "switches": (share >= EDGE) & (share <= 1 - EDGE)}
    name = max(votes, key=lambda role: int(votes[role].sum()))
    count = int(votes[name].sum())
    return (name, count) if 2 * count > len(share) else ("undecided", count)


def _told(told: Probed, inputs: Inputs, opened: np.ndarray) -> dict[str, object]:
    return {
        "feature": told.feature, "auroc": told.auroc, "auroc_low": told.low, "auroc_high": told.high,
        "on": list(told.on), "off": list(told.off),
        "open_inputs": [inputs.names[i] for i in np.flatnonzero(opened)[:SHOWN]],
        "closed_inputs": [inputs.names[i] for i in np.flatnonzero(~opened)[:SHOWN]],
    }  # fmt: skip


def _costs(
    parts: Parts, found: Dynamic, fits: list[int], number: int, confirm: Examples, fallback: Fallback, metric: str, price: float,
    seed: int,
) -> dict[str, object]:  # fmt: skip
    """What closing one part takes where most fits say it is open, and where they say it is closed, with nothing else closed."""
    chosen, place = metric_named(metric), parts.labels.index(found.labels[number])
    lost: list[np.ndarray] = []
    touched: list[np.ndarray] = []
    for batch in confirm.batches(64):
        gates, _ = every_gate(parts, [found.controller(fit) for fit in fits], batch)
        says = (gates[..., place].mean(0) > 0.5).to(gates)
        settings = parts.open(3).expand(-1, len(batch), says.shape[1], -1).clone()
        settings[0, ..., place], settings[1, ..., place] = 1 - says, says
        values = chosen.sign * parts.measure(batch, settings, fallback, chosen).double()
        lost.append((values[2:] - values[:2]).cpu().numpy())
        touched.append(torch.stack([(says == 1).any(1), (says == 0).any(1)]).cpu().numpy())
    cost, where, groups = np.concatenate(lost, 1), np.concatenate(touched, 1), np.array(groups_of(confirm), dtype=object)
    out: dict[str, object] = {}
    ends: list[tuple[float, float, float]] = []
    several = True
    for name, values, rows in zip(("open", "closed"), cost, where, strict=True):
        if not rows.any():
            return {"verified": False}
        found_at = mean_interval(values[rows], groups[rows].tolist(), seed=seed)
        several &= found_at.low is not None
        low, high = (found_at.mean if end is None else end for end in (found_at.low, found_at.high))
        ends.append((found_at.mean, low, high))
        out |= {f"cost_{name}": found_at.mean, f"cost_{name}_low": low, f"cost_{name}_high": high, f"n_{name}": found_at.n}
    (open_cost, open_low, _), (closed_cost, _, closed_high) = ends
    held = open_low > 0 and closed_high < open_low and abs(closed_cost) <= max(NEGLIGIBLE * open_cost, price)
    return out | {"verified": several and held}


def _sentence(row: dict[str, object], n: int) -> str:
    share = f"{row['open_share']:.0%} of {n} unseen inputs"
    if row["role"] == "open":
        return f"{row['site']} is open always ({share})"
    if row["role"] == "undecided":
        return f"{row['site']} is undecided: seeds differ (open on {share})"
    text = f"{row['site']} switches: open on {share}"
    if row["feature"]:
        on, off = (", ".join(repr(value) for value in row[side]) for side in ("on", "off"))  # type: ignore[union-attr]
        text += f"; told by {row['feature']} (AUROC {row['auroc']:.2f}): open on {on or 'none'}; closed on {off or 'none'}"
    if row["cost_open"] is None:
        return text + "; not verified: on confirm prompts it never switches"
    text += (
        f"; closing it costs {row['cost_open']:.3f} [{row['cost_open_low']:.3f}, {row['cost_open_high']:.3f}] where it is open and "
        f"{row['cost_closed']:.3f} [{row['cost_closed_low']:.3f}, {row['cost_closed_high']:.3f}] where it is closed"
    )
    return text + ("" if row["verified"] else "; that does not bear it out")
