"""The table of roles: a row per part, with what the gates say, what stands, and why the rest does not."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from patchclamp.gating.fit import Gated
from patchclamp.gating.judge import Called, Evidence, Side, most

ROLES = ("facilitating", "interfering", "irrelevant", "astray")

COLUMNS: dict[str, str] = {
    "site": "the part",
    "gate": "learned gate G, mean over seeds (with gate_low, gate_high: 95 % interval)",
    "gate_plus": "learned gate G+, likewise",
    "gate_minus": "learned gate G-, likewise",
    "facilitation": "G-, likewise",
    "interference": "1 - G+, likewise",
    "irrelevance": "G+ (1 - G-), likewise",
    "role": "facilitating, interfering, irrelevant, redundant or undecided",
    "any_seed": "the roles by gates that the part has in at least one seed, joined by ' / '",
    "every_seed": "the role by gates that it has in every seed, or empty",
    "worth": "nats that its gate is worth in the fitted circuits on held-out prompts, mean over seeds (positive: as called)",
    "gated_exact": "effect of closing it alone on the same prompts, log-probability of the answer (with _low, _high, _q)",
    "held_out": "whether its role by gates holds on held-out prompts",
    "beats_null": "whether it is worth more than 97.5 % of the parts of every null",
    "agrees": "whether the exact effect has the sign that the role by gates demands",
    "fragile": "whether its role by gates changes within a factor 3 of lambda",
    "redundant_with": "the parts that take over when it closes",
    "null_gate_plus": "G+ under shuffled answers, mean over seeds",
    "null_gate_minus": "G- under shuffled answers, mean over seeds",
    "note": "how to read the role, or why it is undecided",
}
"""What the columns hold."""


def table_of(
    gated: Gated,
    evidence: Evidence,
    bars: Mapping[str, float] | None,
    fragile: Sequence[str],
    redundant: Mapping[int, tuple[int, ...]],
    shuffled: Gated | None,
) -> pl.DataFrame:
    """One row per part.

    Args:
        gated, evidence: the fit and what held-out prompts say of it.
        bars: nats that a facilitating or interfering part has to be worth to beat every null; None where none was fitted.
        fragile: per part, what its role by gates becomes at another lambda, in words; empty where it does not change.
        redundant: which parts stand in for which.
        shuffled: the fit under shuffled answers.
    """
    called = evidence.calls
    named = role_names(called)
    columns: dict[str, object] = {"site": [str(site) for site in gated.labels]}
    for name in ("gate", "gate_plus", "gate_minus", "facilitation", "interference", "irrelevance"):
        columns |= spread(name, getattr(gated, name))
    sides = {"facilitating": (evidence.facilitating, 1), "interfering": (evidence.interfering, -1)}
    checks = {name: _checks(name, side, sign, evidence, bars) for name, (side, sign) in sides.items()}
    rows = [_decide(p, named[p], called, checks, evidence, bars, redundant, gated, fragile[p]) for p in range(len(gated.labels))]
    worth = np.where(named == "interfering", evidence.interfering.mean, evidence.facilitating.mean)
    exact = evidence.exact.table
    pick = {key: [bool(checks[name][key][p]) if name in checks else None for p, name in enumerate(named)] for key in CHECKS}
    columns |= {
        "role": [role for role, _ in rows],
        "any_seed": [" / ".join(name for name in ROLES if getattr(called, name)[:, p].any()) for p in range(len(rows))],
        "every_seed": [next((name for name in ROLES if getattr(called, name)[:, p].all()), "") for p in range(len(rows))],
        "worth": worth,
        **{f"gated_exact{tail}": exact["score" if not tail else tail[1:]] for tail in ("", "_low", "_high", "_q")},
        **{key: pl.Series(values, dtype=pl.Boolean) for key, values in pick.items()},
        "fragile": [bool(text) for text in fragile],
        "redundant_with": [", ".join(str(gated.labels[other]) for other in redundant.get(p, ())) for p in range(len(rows))],
    }
    if shuffled is not None:
        columns |= {"null_gate_plus": shuffled.gate_plus.mean(0), "null_gate_minus": shuffled.gate_minus.mean(0)}
    return pl.DataFrame({**columns, "note": [note for _, note in rows]})


CHECKS = ("held_out", "beats_null", "agrees")


def role_names(called: Called) -> np.ndarray:
    """The role that most seeds' gates give each part, or an empty name."""
    named = np.full(called.irrelevant.shape[1], "", dtype=object)
    for name in ROLES:
        named[most(getattr(called, name))] = name
    return named


def spread(name: str, values: Float[np.ndarray, "seed part"]) -> dict[str, np.ndarray]:
    """Mean over seeds and its interval: the percentile bootstrap from 5 seeds on; the range over seeds below, where resampling
    so few could not reach beyond them anyway."""
    if len(values) < 5:
        low, high = values.min(0), values.max(0)
    else:
        draws = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
        low, high = np.percentile(values[draws].mean(1), [2.5, 97.5], axis=0)
    return {name: values.mean(0), f"{name}_low": low, f"{name}_high": high}


def _checks(
    name: str, side: Side, sign: int, evidence: Evidence, bars: Mapping[str, float] | None
) -> dict[str, Bool[np.ndarray, " part"]]:
    beats = np.zeros(len(side.mean), dtype=bool) if bars is None else side.mean > bars[name]
    return {"held_out": side.holds, "beats_null": beats, "agrees": evidence.exact_sign == sign}


def _decide(
    p: int,
    name: str,
    called: Called,
    checks: Mapping[str, Mapping[str, Bool[np.ndarray, " part"]]],
    evidence: Evidence,
    bars: Mapping[str, float] | None,
    redundant: Mapping[int, tuple[int, ...]],
    gated: Gated,
    fragile: str,
) -> tuple[str, str]:
    """Role and note of one part."""
    exact = float(evidence.exact.values()[p])
    changes = f"; fragile: {fragile}" if fragile else ""
    if p in redundant:
        others = ", ".join(str(gated.labels[other]) for other in redundant[p])
        return "redundant", f"closing it alone costs {exact:.3f} nats; with {others} closed too it matters{changes}"
    if name in checks:
        side = evidence.facilitating if name == "facilitating" else evidence.interfering
        why: list[str] = []
        if not checks[name]["held_out"][p]:
            why.append(
                f"worth {side.mean[p]:.3f} nats on held-out prompts (at least {evidence.pressure:.3f}, clearly, is needed)"
            )
        if bars is None:
            why.append("no null was fitted")
        elif not checks[name]["beats_null"][p]:
            why.append(f"worth {side.mean[p]:.3f} nats, and some of the null's parts more than {bars[name]:.3f}")
        if not checks[name]["agrees"][p]:
            doubt = "" if evidence.exact_sign[p] else ", not clearly"
            why.append(f"closing it alone changes the log-probability by {-exact:+.3f} nats{doubt}")
        return (name, changes[2:]) if not why else ("undecided", f"gates say {name}, but: {'; '.join(why)}{changes}")
    if name == "irrelevant":
        if evidence.costly[p]:
            return (
                "undecided",
                f"gates let it go, but closing it alone changes the log-probability by {-exact:+.3f} nats{changes}",
            )
        return "irrelevant", f"irrelevant while the others are open{changes}"
    votes = ", ".join(
        f"{role} in {int(getattr(called, role)[:, p].sum())}" for role in ROLES if getattr(called, role)[:, p].any()
    )
    told = "gates went against the push" if name == "astray" else "seeds differ"
    return "undecided", f"{told}: {votes} of {len(gated.gate)} seeds{changes}"
