"""Record: everything that a report shows of one study. The study fills it, the store keeps it, the report reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.circuit import Circuit
from patchclamp.errors import StoreError
from patchclamp.scores import Agreement
from patchclamp.scores.statistics import Interval
from patchclamp.store.sections import Alternatives, Contrasts, Dynamics, KeptSets, Localisation, Relations

Verdict = Literal["supported", "not supported", "not tested"]

SCORE_COLUMNS: dict[str, str] = {
    "site": "the part",
    "layer": "its layer (empty for embed)",
    "kind": "embed, head or mlp",
    "index": "the head's number",
    "exact": "effect of closing the gate alone on prompts not used for fitting, open minus closed",
    "exact_low": "its 95 % interval, low end",
    "exact_high": "its 95 % interval, high end",
    "exact_p": "two-sided p",
    "exact_q": "Benjamini-Hochberg q",
    "second": "the same effect under the second fallback",
    "second_low": "its interval, low end",
    "second_high": "its interval, high end",
    "gradient": "attribution patching",
    "integrated": "integrated gradients over the gate",
    "random": "a random score, for comparison",
    "shifted": "the exact effect after random prefixes",
    "shifted_low": "its interval, low end",
    "shifted_high": "its interval, high end",
    "gate": "learned gate G, mean over seeds (likewise gate_plus and gate_minus)",
    "gate_low": "its interval over seeds, low end",
    "gate_high": "its interval over seeds, high end",
    "gate_plus": "learned gate G+ (keeps what is not needed to be closed)",
    "gate_plus_low": "its interval over seeds, low end",
    "gate_plus_high": "its interval over seeds, high end",
    "gate_minus": "learned gate G- (keeps only what is needed)",
    "gate_minus_low": "its interval over seeds, low end",
    "gate_minus_high": "its interval over seeds, high end",
    "facilitation": "share of seeds, or score, for facilitating",
    "interference": "share of seeds, or score, for interfering",
    "irrelevance": "share of seeds, or score, for irrelevant",
    "role": "facilitating, interfering, irrelevant, undecided or redundant",
    "any_seed": "the roles that the part has in at least one seed, joined by ' / '",
    "every_seed": "the role that it has in every seed, or empty",
    "fragile": "whether the role changes within a factor 3 of lambda",
    "redundant_with": "the parts that take over when it closes",
    "null_exact": "the exact effect under shuffled answers",
    "null_gate_plus": "G+ under shuffled answers",
    "null_gate_minus": "G- under shuffled answers",
    "note": "why the role is undecided, in words",
}
"""The columns of `Record.scores` that the report knows: the first four are needed, every other may be absent or empty."""

FRAMES: dict[str, tuple[str, ...]] = {
    "toggles": ("order", "k", "value", "low", "high"),
    "curve": ("k", "faithfulness", "low", "high", "completeness"),
    "random": ("k", "draw", "faithfulness"),
}


@dataclass(frozen=True)
class ModelInfo:
    """The model: `heads` per layer, `hash` of the weights."""

    name: str
    family: str
    layers: int
    heads: tuple[int, ...]
    parameters: int
    hash: str
    dtype: str = "float32"


@dataclass(frozen=True)
class TaskInfo:
    """The task: numbers of prompts in each set, what was dropped and why, the share of the most frequent answer."""

    name: str
    about: str
    hash: str
    fit: int
    select: int
    confirm: int
    dropped: Mapping[str, int]
    majority: float


@dataclass(frozen=True)
class Provenance:
    """What is needed to get the same numbers again. `seconds` per step, `memory` the peak in bytes, `date` in ISO 8601; `other` the
    model whose values closed gates pass, where that is the fallback."""

    model: ModelInfo
    task: TaskInfo
    versions: Mapping[str, str]
    device: str
    seeds: tuple[int, ...]
    seconds: Mapping[str, float]
    memory: int
    digest: str
    command: str
    date: str
    other: ModelInfo | None = None


@dataclass(frozen=True)
class Baseline:
    """The behaviour with all gates open and all closed, on the confirm set; `accuracy` is the share of pairs with metric > 0."""

    metric: str
    open: Interval
    closed: Interval
    accuracy: float | None
    top1: float | None
    majority: float
    n: int


@dataclass(frozen=True)
class Claim:
    """A sentence that can be wrong.

    Args:
        statement: what is claimed.
        scope: for which model, prompts, metric and fallback.
        evidence: the numbers that speak for or against it.
        refute: the intervention whose outcome would refute it.
        verdict: supported, not supported or not tested.
    """

    statement: str
    scope: str
    evidence: str
    refute: str
    verdict: Verdict


@dataclass(frozen=True)
class Null:
    """Shares of parts that gating calls facilitating and interfering where there is nothing to find.

    `raw_*`: by the gates alone; the others: with every safeguard on.
    """

    name: str
    facilitating: float
    interfering: float
    raw_facilitating: float
    raw_interfering: float
    parts: int
    seeds: int


@dataclass(frozen=True)
class Trust:
    """How far to trust the circuit, on the confirm set. `random`: circuits of the same size; `minimality`: what each part's
    closing costs the circuit; `stability`: mean Jaccard index over pairs of seeds."""

    faithfulness: Interval
    random: Interval
    draws: int
    completeness: Interval | None = None
    minimality: Mapping[str, float] = field(default_factory=dict[str, float])
    stability: float | None = None


@dataclass(frozen=True)
class Prompt:
    """An example prompt. `probabilities` has one number per token: what the model gave it (None where it was not predicted)."""

    tokens: tuple[str, ...]
    probabilities: tuple[float | None, ...]
    answer: str
    p_answer: float
    metric: float
    wrong: str | None = None
    p_wrong: float | None = None
    corrupt: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Patterns:
    """Attention patterns of the top heads on one prompt: `weights` [head, query, key], rows of `sites`."""

    sites: tuple[str, ...]
    tokens: tuple[str, ...]
    weights: Float[np.ndarray, "head query key"]


@dataclass(frozen=True)
class Record:
    """One study, as the report reads it.

    What a study did not do is None or empty, and the report says "not tested".

    Args:
        headline: what was found, in one sentence of words.
        plan: the question, as plain JSON.
        provenance: what is needed to get the same numbers again.
        baseline: the behaviour with all gates open and closed.
        scores: a row per part; columns as in `SCORE_COLUMNS`, others are kept and not shown.
        fallbacks: the fallback of `exact`, and that of `second` where there is one.
        agreement: name of the comparison ("gradient", "second fallback", "random prefixes", ...) -> agreement with `exact`.
        nulls: shuffled answers, re-initialised weights.
        toggles: columns order (by which score), k (parts of G+ switched off), value, low, high.
        toggled: what `toggles.value` is ("log-probability of the answer").
        curve: columns k, faithfulness, low, high, completeness (both ends included).
        random: columns k, draw, faithfulness, of random circuits.
        circuit: the chosen parts.
        trust: numbers on the circuit.
        examples: prompts with probabilities.
        patterns: attention of the top heads.
        claims: sentences with verdicts.
        warnings: what the reader must know before anything else.
        relations: how parts go together.
        dynamics: gates that are a function of the input.
        contrast: another behaviour lost while this one is kept.
        sets: sets of parts of a wanted size or price.
        alternatives: the several sets that suffice.
        localisation: several methods on the same parts, side by side.
    """

    headline: str
    plan: Mapping[str, Any]
    provenance: Provenance
    baseline: Baseline
    scores: pl.DataFrame
    fallbacks: tuple[str, ...] = ()
    agreement: Mapping[str, Agreement] = field(default_factory=dict[str, Agreement])
    nulls: tuple[Null, ...] = ()
    toggles: pl.DataFrame | None = None
    toggled: str = "metric"
    curve: pl.DataFrame | None = None
    random: pl.DataFrame | None = None
    circuit: Circuit | None = None
    trust: Trust | None = None
    examples: tuple[Prompt, ...] = ()
    patterns: Patterns | None = None
    claims: tuple[Claim, ...] = ()
    warnings: tuple[str, ...] = ()
    relations: Relations | None = None
    dynamics: Dynamics | None = None
    contrast: Contrasts | None = None
    sets: KeptSets | None = None
    alternatives: Alternatives | None = None
    localisation: Localisation | None = None

    def __post_init__(self) -> None:
        needed = {"scores": tuple(SCORE_COLUMNS)[:4], **FRAMES}
        for name, columns in needed.items():
            frame: pl.DataFrame | None = getattr(self, name)
            missing = [column for column in columns if frame is not None and column not in frame.columns]
            if missing:
                raise StoreError(f"a record's {name} need the columns {', '.join(columns)}: {', '.join(missing)} not there")
