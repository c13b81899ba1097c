"""Circuit: a frozen set of parts, with what produced it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from patchclamp.errors import PatchclampError
from patchclamp.scores import Part, parse_part


@dataclass(frozen=True, init=False)
class Circuit:
    """A set of parts; two circuits are equal where their parts are, whatever produced them.

    `a & b`, `a | b` and `a - b` give circuits whose `about` says which operation joined what. `in` takes a site or its text.

    Args:
        sites: sites or edges, or their texts.
        about: what produced it: method, threshold, metric, fallback, n, seed, model, task, as far as known.
    """

    sites: frozenset[Part]
    about: Mapping[str, Any] = field(compare=False)

    def __init__(self, sites: Iterable[Part | str], about: Mapping[str, Any] | None = None) -> None:
        parts = frozenset(parse_part(site) if isinstance(site, str) else site for site in sites)
        object.__setattr__(self, "sites", parts)
        object.__setattr__(self, "about", dict(about or {}))

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Part]:
        """In forward order: sites first, then edges."""
        yield from sorted((site for site in self.sites if not hasattr(site, "source")), key=_site_key)
        yield from sorted((site for site in self.sites if hasattr(site, "source")), key=_site_key)

    def __contains__(self, site: object) -> bool:
        return (parse_part(site) if isinstance(site, str) else site) in self.sites

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._joined("&", other, self.sites & other.sites)

    def __or__(self, other: "Circuit") -> "Circuit":
        return self._joined("|", other, self.sites | other.sites)

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._joined("-", other, self.sites - other.sites)

    def _joined(self, operation: str, other: "Circuit", sites: Iterable[Part]) -> "Circuit":
        return Circuit(sites, {"operation": operation, "of": [dict(self.about), dict(other.about)]})

    def jaccard(self, other: "Circuit") -> float:
        """|a & b| / |a | b|; 1 for two empty circuits."""
        union = self.sites | other.sites
        return len(self.sites & other.sites) / len(union) if union else 1.0

    def to_json(self) -> str:
        """`{"sites": [...], "about": {...}}`, sites in forward order."""
        return json.dumps({"sites": [str(site) for site in self], "about": self.about})

    @classmethod
    def from_json(cls, text: str) -> "Circuit":
        """Read what `to_json` wrote."""
        body = json.loads(text)
        if not isinstance(body, dict) or not isinstance(body.get("sites"), list):
            raise PatchclampError(
                'a circuit is written {"sites": ["L9.h6", ...], "about": {...}}: this text has no list of sites'
            )
        return cls(body["sites"], body.get("about"))

    def __str__(self) -> str:
        known = ", ".join(f"{name} {value}" for name, value in self.about.items() if isinstance(value, str | int | float))
        return f"Circuit of {len(self)} parts" + (f" ({known})" if known else "") + f": {', '.join(map(str, self)) or 'none'}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """One line per layer, for a notebook."""
        layers: dict[str, list[str]] = {}
        for site in self:
            layers.setdefault(str(site).partition(".")[0], []).append(str(site))
        rows = "".join(f"<tr><th>{escape(layer)}</th><td>{escape(', '.join(names))}</td></tr>" for layer, names in layers.items())
        return f"<div><p>{escape(str(self).partition(':')[0])}</p><table>{rows}</table></div>"


def _site_key(site: Part) -> tuple[Any, ...]:
    return site.key
