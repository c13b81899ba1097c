"""Tables and figures of a study for a paper."""

from pathlib import Path

import polars as pl

from patchclamp.errors import StoreError
from patchclamp.report import figures
from patchclamp.store import Record


def write_csv(record: Record, path: Path) -> Path:
    """The table of parts as CSV; a list in a cell is joined by blanks."""
    lists = [name for name, kind in record.scores.schema.items() if isinstance(kind, pl.List)]
    table = record.scores.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(" ") for name in lists)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write_csv(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def charts(record: Record) -> dict[str, figures.Chart]:
    """Every figure that the study has numbers for, by name."""
    scores, found = record.scores, dict[str, figures.Chart]()
    if "role" in scores.columns:
        found["roles"] = figures.role_map(scores)
    if "exact" in scores.columns:
        found["effects"] = figures.effect_map(scores)
        for name in ("gradient", "integrated", "second"):
            if name in scores.columns:
                found[f"agreement-{name}"] = figures.agreement_scatter(scores, name, name)
    if record.curve is not None:
        found["faithfulness"] = figures.faithfulness_curve(
            record.curve, record.random, len(record.circuit) if record.circuit else None
        )
    if record.circuit is not None:
        found["circuit"] = figures.circuit_drawing(record.circuit, scores)
    if record.trust is not None and record.trust.minimality:
        found["minimality"] = figures.minimality_bars(record.trust.minimality)
    if record.toggles is not None:
        found["toggles"] = figures.toggle_curves(record.toggles, record.toggled)
    if record.relations is not None:
        found["interactions"] = figures.interaction_matrix(record.relations.pairs, record.relations.parts)
        found["connectome"] = figures.connectome(record.relations.pairs, record.relations.parts)
        if "association" in record.relations.pairs.columns:
            found["causal-statistical"] = figures.causal_against_statistical(record.relations.pairs)
    if (methods := record.localisation) is not None:
        found["method-agreement"] = figures.method_agreement(methods.agreement)
        if methods.curves.height:
            found["method-faithfulness"] = figures.faithfulness_curves(methods.curves)
        if methods.circuit is not None and len(methods.circuit):
            found["localised-circuit"] = figures.circuit_drawing(methods.circuit, methods.scores)
        if methods.flow is not None and methods.flow.height:
            found["flow"] = figures.flow_graph(methods.flow, methods.tokens)
    for head, site in enumerate(record.patterns.sites if record.patterns is not None else ()):
        assert record.patterns is not None
        found[f"pattern-{site}"] = figures.attention_pattern(record.patterns, head)
    return found


def write_figures(record: Record, folder: Path, kind: str = "svg") -> list[Path]:
    """Save every figure as SVG or PNG; returns the paths.

    Raises:
        StoreError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        for name, chart in charts(record).items():
            paths.append(folder / f"{name}.{kind}")
            chart.save(paths[-1])
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error
    return paths
