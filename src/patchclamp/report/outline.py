"""The sections of a report in their order: which of them have something to show, and what the others would have tested."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchclamp.store.record import Record


@dataclass(frozen=True)
class Section:
    """A section: its place on the page, its title, whether it has anything to show, and what was not tested where it has not."""

    id: str
    title: str
    there: bool
    absent: str = ""


def outline(record: Record, shown: Mapping[str, Any]) -> tuple[Section, ...]:
    """Every section of a record's report; `shown` holds what the template shows (`panels.context`)."""
    sets = record.sets is not None or record.alternatives is not None
    return (
        Section("map", "Map", bool(shown["maps"]), "neither roles nor effects"),
        Section("claims", "Claims", bool(record.claims), "no claim was made"),
        Section("roles-table", "Every part", True),
        Section("agreement", "Agreement", bool(shown["scatters"] or record.agreement), "no estimate stands beside the exact effect"),
        Section(
            "nulls", "Where there is nothing", bool(shown["null_figures"]),
            "gates were not fitted to shuffled answers or to weights drawn anew",
        ),
        Section("circuit-section", "Circuit", bool(shown["circuit_figures"] or shown["curve"]), "no circuit was chosen"),
        Section("localisation", "Methods side by side", record.localisation is not None, "no others beside (patchclamp localise)"),
        Section("relations", "Relations", record.relations is not None, "how parts depend on each other (patchclamp relate)"),
        Section("dynamic", "Dynamic gates", record.dynamics is not None, "gates that depend on the input (patchclamp gate --dynamic)"),
        Section(
            "contrast", "Contrast", record.contrast is not None,
            "another behaviour lost while this one is kept (patchclamp gate --contrast TASK)",
        ),
        *([Section("sets", "Sets of parts", there=True)] if sets else []),
        Section("toggle", "Toggle check", shown["toggles"] is not None, "parts were not closed one after another"),
        Section("robust", "Fallbacks and positions", bool(shown["robust"]), "a second fallback, and prompts after random prefixes"),
        Section("prompts", "Prompts", bool(shown["prompts"]), "no prompt was kept"),
        Section("attention", "Attention", bool(shown["patterns"]), "no attention pattern was kept"),
        Section("provenance", "Provenance", True),
    )  # fmt: skip
