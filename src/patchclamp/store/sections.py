"""Sections of a record that a study fills where they were asked for: relations, dynamics, contrasts, sets of parts, localisation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from patchclamp.circuit import Circuit


@dataclass(frozen=True)
class Relations:
    """How parts go together.

    Args:
        pairs: a row per pair: a, b, interaction (with low, high, q), other (the same under the second fallback, with other_low,
            other_high, other_q), frozen (with the final norm's scale held), word (AND, OR, none, undecided), relation
            (redundancy, backup, suppression, or empty), association (of outputs, with association_q).
        parts: a row per part: site, layer, effect, community, order (its place in the matrix), strength (sum of |interaction|).
        changed: conditional roles that differ from those with all gates open: a (closed), b, open, score, open_role, role,
            shift, shift_q.
        repair: what later parts' direct effects do when a part closes: a (closed), b, score (compensation), low, high, q.
        families: examples with mechanisms of their own, a row per family: family, n, feature, auroc, on, off, examples, top (its largest
            effects); `about.families` says why there are so many.
        about: fallbacks, metric, n, how many parts were looked at of how many, modularity with its null, and the like.
        shapley: a row per part, where it was asked for: site, score (its Shapley value among these parts) with low, high, sampling (its
            standard error from permutations alone); `pairs` then has a column `shapley`, the interaction index.
        screened: pairs among all parts that random masks point to, measured exactly: a, b, score, low, high, q, by_masks;
            `about.missed` says in words what was missed at most.
    """

    pairs: pl.DataFrame
    parts: pl.DataFrame
    changed: pl.DataFrame
    repair: pl.DataFrame | None = None
    families: pl.DataFrame | None = None
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shapley: pl.DataFrame | None = None
    screened: pl.DataFrame | None = None


@dataclass(frozen=True)
class Dynamics:
    """Gates that are a function of the input.

    Args:
        parts: a row per part: site, role (open, closed, switches, undecided), open_share, feature, auroc, cost_open, cost_closed, verified.
        gates: of parts that switch, by unseen input: site, input, group, gate.
        advantage: a row per price: open, d, static_d, difference, low, high.
        controls: the same of the fit and of its controls: kind.
        sentences: what was found, in words.
        about: scope, site, n, whether arbitrary labels were rejected.
    """

    parts: pl.DataFrame
    gates: pl.DataFrame
    advantage: pl.DataFrame
    controls: pl.DataFrame
    sentences: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Contrasts:
    """One behaviour kept while another is lost.

    Args:
        parts: a row per part: site, isolated, kept, isolated_reverse, kept_reverse, alone_a, alone_b with _low, _high.
        evaluation: a row per direction, side and seed: size, share_a, low_a, high_a, share_b, low_b, high_b, separates.
        about: a, b, n_a, n_b, fallback, keep, lose.
        warnings: what the reader must know.
    """

    parts: pl.DataFrame
    evaluation: pl.DataFrame
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeptSets:
    """Sets of parts by learned gates, and others of the same sizes.

    Args:
        table: a row per set: method (exactly k, hard concrete, exact effect, random), knob (k, or the price of an open gate in nats), seed,
            size, kept (parts joined by blanks), share (of the behaviour that it alone keeps on confirm prompts) with low, high; value.
        about: task, metric, fallback, n, fit_on.
        warnings: what the reader must know.
    """

    table: pl.DataFrame
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alternatives:
    """The distinct sets of parts that suffice.

    Args:
        table: a row per set: solution, kept (parts joined by blanks), size, seeds, share with low, high, sufficient, family.
        substitutes: a row per pair in which sufficient sets differ: a, b, alone_a, alone_b, joint, excess with low, high, clear, swaps,
            substitutes (whether the two stand in for each other).
        core: the parts of every sufficient set.
        union: the parts of any.
        about: wanted (share), distinct (sufficient sets), families (once those alike are one), n, seeds.
    """

    table: pl.DataFrame
    substitutes: pl.DataFrame
    core: tuple[str, ...]
    union: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Localisation:
    """Several methods on the same parts: how they agree, and how faithful the circuits are that they choose.

    Args:
        scores: a row per part: site, exact where it was measured, and a column per method.
        agreement: a row per two methods: a, b, spearman, n (parts that both score), top (share of the first tenth of parts that they have in
            common).
        curves: a row per method and size: method, share, parts, faithfulness, low, high.
        areas: a row per method, order and area: method, name (CPR, CMD, log_area), value, low, high.
        circuit: edges or parts, with what chose them; None where none was chosen.
        flow: information flow routes of one prompt: level, source, target, part, share; None where they were not drawn.
        tokens: of that prompt.
        about: parts (nodes, edges, ...), how many, metric, fallback, n, seed, passes by method.
    """

    scores: pl.DataFrame
    agreement: pl.DataFrame
    curves: pl.DataFrame
    areas: pl.DataFrame
    circuit: Circuit | None = None
    flow: pl.DataFrame | None = None
    tokens: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
