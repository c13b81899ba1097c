"""Carrying out the steps of a map that has begun, and what is made of them: the study."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from patchclamp import gating
from patchclamp.circuit import Circuit
from patchclamp.discover.threshold import ranked
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.scores import Scores
from patchclamp.store.record import Claim, Record
from patchclamp.study import located, relate, searches, steps
from patchclamp.study import record as records
from patchclamp.study.asked import told
from patchclamp.study.claims import Found, claims, headline
from patchclamp.study.gates import contrasted, dynamic, sets, several
from patchclamp.study.localise import localise
from patchclamp.study.plan import EXTRA, STEPS
from patchclamp.study.provenance import provenance
from patchclamp.study.work import Work, score
from patchclamp.trust import Trusted, resampled_circuits, trust

FINISHED = {
    "roles": "gate",
    "second": "verify",
    "discover": "discover",
    "acdc": "discover",
    "greedy": "discover",
    "masks": "discover",
    "codes": "discover",
    "path": "discover",
    "screened": "attribute",
    "localised": "localise",
    "trust": "trust",
    "families": "relate",
    "dynamic": "dynamic",
    "contrast": "contrast",
    "sets": "sets",
    "solutions": "solutions",
}
"""Which step of a map has been done where a run has kept the result of this name."""


@dataclass(frozen=True)
class Study:
    """Everything that one run found. In a notebook it shows itself."""

    record: Record
    folder: Path | None = None

    @property
    def scores(self) -> pl.DataFrame:
        """A row per part: exact effects with intervals, attributions, gates, roles."""
        return self.record.scores

    @property
    def circuit(self) -> Circuit | None:
        """The parts that keep the behaviour."""
        return self.record.circuit

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Every sentence, with scope, evidence, refuting intervention and verdict."""
        return self.record.claims

    def __str__(self) -> str:
        return self.record.headline

    def __repr__(self) -> str:
        return f"Study({self.record.headline!r}, folder={str(self.folder) if self.folder else None!r})"

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<li><b>{escape(claim.verdict)}</b>: {escape(claim.statement)} ({escape(claim.evidence)})</li>"
            for claim in self.claims
        )
        table = Scores(self.scores.rename({"exact": "score"}), {})._repr_html_() if "exact" in self.scores.columns else ""  # pyright: ignore[reportPrivateUsage]
        return f"<p><b>{escape(self.record.headline)}</b></p><ul>{rows}</ul>{table}"


def carry_out(work: Work, do: Collection[str] = STEPS) -> Study:
    """The steps of a map that has begun."""
    if unknown := set(do) - {*STEPS, *EXTRA}:
        raise PatchclampError(f"there is no step {sorted(unknown)[0]!r}: choose from {', '.join((*STEPS, *EXTRA))}")
    do = {*do, *(step for name, step in FINISHED.items() if name in work.run.seconds)}  # what a run has found stays in it
    if work.plan.tied and (whole := do & {"relate", "localise"}):
        raise PatchclampError(
            f"{sorted(whole)[0]} is of heads and MLPs, and a mixture of parts was asked for ({', '.join(work.plan.tied)}): leave --tied out"
        )
    if {"discover", "trust"} & set(do):
        searches.check(work)
    if "localise" in do:
        work.found["localisation"] = localise(work)
        do -= {"localise"}
    if work.plan.parts != "nodes":
        located.check(do)
        parts = located.parts_of(work.plan, work.model, work.parts.memory)
        work.found["located"] = located.locate(work, do, parts)
        return _finish(work)
    score(work, do)
    if "verify" in do:
        _shift(work)
    if "attribute" in do or "verify" in do:
        _agree(work)
    if {"gate", "solutions"} & set(do):
        _gate(work)
    if {"discover", "trust"} & set(do):
        _discover(work)
    none = work.found.get("circuit") is None and bool({"gate", "verify"} & do)
    if "trust" in do and not none:  # a whole map goes on without a circuit, and says that there is none
        _trust(work)
    if "relate" in do:
        work.found["relations"] = relate.relate(work)
    if "dynamic" in do:
        work.found["dynamics"] = dynamic(work)
    if "contrast" in do:
        work.found["contrast"] = contrasted(work)
    if "sets" in do:
        work.found["sets"] = sets(work)
    if "solutions" in do:
        work.found["alternatives"] = several(work)
    return _finish(work)


def _shift(work: Work) -> None:
    """Exact effects of the top parts behind random prefixes."""
    if work.plan.direction == "denoising":
        work.found["shifted"] = steps.Shifted(None, "prompts were not shifted: effects are of denoising")
        return
    top = steps.top_parts(work.found["exact"], work.parts, 6)
    work.found["shifted"] = work.run.step(
        "shifted", steps.behind_prefixes, work.parts, work.model, work.split.confirm, work.kind, work.fallback, top, work.metric,
        work.plan.seed,
    )  # fmt: skip


def _agree(work: Work) -> None:
    """How far cheaper methods, the second fallback and shifted prompts agree with exact effects."""
    found = work.found
    exact: Scores = found["exact"]
    found["agreement"] = {name: scores.agreement(exact) for name, scores in found["attributions"].items() if name != "exact"}
    if "second" in found:
        found["agreement"]["second fallback"] = found["second"].agreement(exact)
    if "shifted" in found and found["shifted"].scores is not None:
        found["agreement"]["random prefixes"] = found["shifted"].scores.agreement(exact)


def _gate(work: Work) -> None:
    """Learned gates: roles with their nulls, judged on prompts they were not fitted to."""
    split = work.split
    work.found["roles"] = work.run.step(
        "roles", gating.roles, work.parts, split.fit, split.select, work.fallback, work.plan.gating, progress=work.told,
        keep=partial(work.run.piece, "roles"),
    )  # fmt: skip


def _discover(work: Work) -> None:
    """A circuit from exact effects on the select set."""
    plan, split, samples = work.plan, work.split, work.found["samples"]
    sites = [work.parts.labels[number] for number in work.parts.counted]
    about = {"method": "exact", "metric": work.metric, "fallback": work.fallback.kind, "seed": plan.seed}
    scores = Scores.from_samples(sites, samples.double().numpy(), about, groups=groups_of(split.select), seed=plan.seed)
    work.found |= {"selected": scores, **searches.searched(work, work.parts, split.select, work.fallback, scores)}


def _trust(work: Work) -> None:
    """The circuit on the confirm set, against random circuits of its size and shape."""
    plan, found, confirm = work.plan, work.found, work.split.confirm
    searches.require(found)
    resampled = resampled_circuits(
        found["selected"], found["samples"], len(found["circuit"]), groups_of(work.split.select), seed=plan.seed
    )
    found["trusted"] = work.run.step(
        "trust", trust, work.parts, confirm, work.fallback, found["circuit"], ranked(found["selected"], plan.order),
        groups=groups_of(confirm), metric=work.metric, random_circuits=plan.random_circuits, resampled=resampled, seed=plan.seed,
        progress=work.progress("circuit against random ones"),
    )  # fmt: skip


def _finish(work: Work) -> Study:
    found, model, task, run, confirm = work.found, work.model, work.task, work.run, work.split.confirm
    many: located.Located | None = found.get("located")
    trusted: Trusted | None = found.get("trusted") if many is None else many.trusted
    circuit: Circuit | None = found.get("circuit") if many is None else many.circuit
    shifted: steps.Shifted | None = found.get("shifted")
    roles = found.get("roles")
    summary = Found(
        model=model.name.rstrip("/").rpartition("/")[2] or model.name,
        task=task.name,
        n=len(confirm),
        fallback=told(work.fallback.kind, work.other),
        baseline=work.baseline,
        parts=len(work.parts.counted) if many is None else many.of,
        noun=many.parts if many is not None else "parts" if work.plan.tied else "heads and MLPs",
        exact=found.get("exact"),
        second=found.get("second"),
        second_fallback=told(found.get("second_fallback", ""), work.other),
        shifted=None if shifted is None else shifted.scores,
        shift_reason="" if shifted is None else shifted.reason,
        agreement=found.get("agreement"),
        roles=None if roles is None else roles.table,
        nulls=() if roles is None else records.nulls_of(roles),
        circuit=circuit,
        wanted=work.plan.faithfulness,
        trusted=trusted,
        relations=found.get("relations"),
    )
    top = steps.top_parts(found["exact"], work.parts, 6, heads_only=True) if "exact" in found else []
    record = Record(
        headline=headline(summary),
        plan=records.plan_of(work.plan),
        provenance=provenance(model, task, work.split, work.plan, run, work.other),
        baseline=work.baseline,
        scores=records.table(work.parts, found),
        fallbacks=(told(work.kind, work.other), *([told(found["second_fallback"], work.other)] if "second" in found else [])),
        agreement=found.get("agreement", {}),
        nulls=tuple(summary.nulls),
        toggles=None if roles is None else roles.toggles,
        toggled="log-probability of the answer",
        curve=None if trusted is None else trusted.curve,
        random=None if trusted is None else trusted.draws,
        circuit=circuit,
        trust=None if trusted is None else records.trust_of(trusted),
        examples=run.step("prompts", steps.prompts, model, confirm, work.metric),
        patterns=run.step("patterns-all" if top else "patterns-none", steps.patterns, model, confirm, top),
        claims=(*claims(summary), *located.sentences(many or found.get("findings", ()), summary.scope)),
        warnings=tuple([*work.warnings, *(() if roles is None else roles.warnings)]),
        relations=found.get("relations"),
        dynamics=found.get("dynamics"),
        contrast=found.get("contrast"),
        sets=found.get("sets"),
        alternatives=found.get("alternatives"),
        localisation=found.get("localisation", None if many is None else located.localisation(many, len(confirm), len(confirm))),
    )
    run.save(record)
    return Study(record, run.folder)
