"""Sites: places in the computation. A site parses, prints, sorts in forward order and matches patterns.

The grammar, by example::

    embed  final  logits                     before the first block, after the last norm, the end
    L5.resid.pre  L5.resid.mid  L5.resid.post
    L9.attn  L9.mlp                          what a module returns
    L9.attn.write  L9.mlp.write              what it adds to the residual stream
    L9.h6                                    a head as a part (its gate sits on z)
    L9.h6.q|z|scores|pattern|write           one query head;   L9.z: all heads of the layer
    L9.kv2.k|v                               one key/value head, native under grouped-query attention
    L9.kv2  L9.block                         groups with one gate: a key/value head's key and value; what attention and MLP add
    L3.mlp.n127  L3.mlp.n                    one neuron, all neurons
    L3.router  L3.mlp.e5  L3.mlp.e5.n7       mixture of experts
    L5.resid.post.f1234:DICT                 a dictionary feature
    L9.h6@-1  L9.h6@S2  L9.mlp@3             a position, a named span
    L2.mlp>L9.h6.q                           an edge (`..` is read as `>`)

``KINDS`` is the one table of kinds: the docs, ``patchclamp sites``, errors and tests derive from it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from patchclamp.errors import SiteError

Axis = Literal["batch", "position", "width", "head", "kv_head", "head_width", "query", "key", "neuron", "expert", "token"]


class Kind(NamedTuple):
    """One row of the table of kinds of site."""

    axes: tuple[Axis, ...]
    """Named axes of the value, as `Model.record` returns it for the whole layer."""
    writable: bool
    """Whether an edit at this site takes effect."""
    obtained: str
    """How the value is read."""
    absent: str
    """When a model has no such site, and why."""
    order: int
    """Place within a block, in forward order."""


RESID: tuple[Axis, ...] = ("batch", "position", "width")
HEADS: tuple[Axis, ...] = ("batch", "position", "head", "head_width")
KV: tuple[Axis, ...] = ("batch", "position", "kv_head", "head_width")
MAPS: tuple[Axis, ...] = ("batch", "head", "query", "key")

# fmt: off
KINDS: dict[str, Kind] = {
    "embed": Kind(RESID, True, "input of the first block", "never", 0),
    "resid.pre": Kind(RESID, True, "input of the block", "never", 1),
    "q": Kind(HEADS, True, "attention tap: queries after rotary embedding and norms", "no softmax attention in the layer", 2),
    "k": Kind(KV, True, "attention tap: keys after rotary embedding, norms and cache", "no softmax attention in the layer", 3),
    "v": Kind(KV, True, "attention tap: values after cache", "no softmax attention in the layer", 4),
    "scores": Kind(MAPS, True, "attention tap: input of softmax (scaled, capped, masked; a sink's column is left out)",
                   "a fused kernel that never forms them (eager attention is switched on for the call)", 5),
    "pattern": Kind(MAPS, True, "attention tap: output of softmax (with a sink, rows of real keys sum to less than 1)",
                    "a fused kernel that never forms it (eager attention is switched on for the call)", 6),
    "z": Kind(HEADS, True, "input of the attention's output projection, split by head", "no output projection", 7),
    "head": Kind(HEADS, True, "a head as a part: the same place as z", "no output projection", 8),
    "write": Kind(("batch", "position", "head", "width"), False,
                  "output projection of one head's z, scaled as the block adds it (post-norms linearised at the run's own scale)",
                  "no output projection", 9),
    "attn": Kind(RESID, True, "output of the attention module", "never", 10),
    "attn.write": Kind(RESID, True, "what attention adds to the residual stream (after post-norm and multiplier)", "never", 11),
    "resid.mid": Kind(RESID, True, "residual stream between attention and MLP", "parallel blocks have no middle", 12),
    "router": Kind(("batch", "position", "expert"), True, "router logits", "the layer is not a mixture of experts", 13),
    "neuron": Kind(("batch", "position", "neuron"), True, "input of the MLP's down projection",
                   "experts keep their neurons inside a fused kernel", 14),
    "expert": Kind(("batch", "position", "expert"), True, "routing weight of each expert",
                   "the layer is not a mixture of experts", 15),
    "mlp": Kind(RESID, True, "output of the MLP module", "never", 16),
    "mlp.write": Kind(RESID, True, "what the MLP adds to the residual stream (after post-norm and multiplier)", "never", 17),
    "resid.post": Kind(RESID, True, "output of the block", "never", 18),
    "final": Kind(RESID, True, "output of the final norm, input of the unembedding", "never", 19),
    "logits": Kind(("batch", "position", "token"), True, "output of the model", "never", 20),
}
# fmt: on

GROUPS: dict[str, Kind] = {
    "kv": Kind(KV, False, "a group: the key and the value of one key/value head", "no softmax attention in the layer", 3),
    "block": Kind(RESID, False, "a group: what attention and MLP add to the residual stream", "never", 17),
}
"""Groups of sites that share one gate (`parts.tied`): names of parts, and no places that hold a value."""

PER_HEAD = ("q", "scores", "pattern", "z", "write")
PER_KV = ("k", "v")
_GLOBAL = ("embed", "final", "logits")


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the computation.

    `kind` is a key of `KINDS`; `layer` is None only for embed, final and logits; `index` picks a head, key/value head,
    neuron or expert (None: all of them); `sub` picks a neuron inside an expert; `feature` with `dictionary` picks a
    dictionary feature read from the site; `position` is an index (negative from the end) or the name of a span.
    """

    kind: str
    layer: int | None = None
    index: int | None = None
    sub: int | None = None
    feature: int | None = None
    dictionary: str | None = None
    position: int | str | None = None

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read a site; raises `SiteError` that says what was asked and what the grammar knows."""
        return _parse(text)

    def __str__(self) -> str:
        text = self.kind if self.kind in _GLOBAL else f"L{self.layer}.{self._tail()}"
        if self.feature is not None:
            text += f".f{self.feature}:{self.dictionary}"
        return text if self.position is None else f"{text}@{self.position}"

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"

    def _tail(self) -> str:
        kind, i = self.kind, self.index
        if kind in ("head", "kv"):
            mark = "h" if kind == "head" else kind
            return f"{mark}*" if i is None else f"{mark}{i}"
        if kind in PER_HEAD:
            return kind if i is None and kind != "write" else (f"h*.{kind}" if i is None else f"h{i}.{kind}")
        if kind in PER_KV:
            return kind if i is None else f"kv{i}.{kind}"
        if kind == "neuron":
            return "mlp.n" if i is None else f"mlp.n{i}"
        if kind == "expert":
            base = "mlp.e" if i is None else f"mlp.e{i}"
            return base if self.sub is None else f"{base}.n{self.sub}"
        return kind

    @property
    def key(self) -> tuple[int, int, int, int, int, str]:
        """Sorting key: forward order, then index, then dictionary and position (from the start, from the end, by name)."""
        layer = {"embed": -1, "final": 10**6, "logits": 10**6 + 1}.get(self.kind, self.layer if self.layer is not None else -1)
        index, sub, feature = (-1 if number is None else number for number in (self.index, self.sub, self.feature))
        order = (GROUPS if self.kind in GROUPS else KINDS)[self.kind].order
        return (layer, order, index, sub, feature, f"{self.dictionary or ''}@{_position_key(self.position)}")

    def __lt__(self, other: "Site") -> bool:
        return self.key < other.key

    @property
    def place(self) -> "Site":
        """The whole-layer site that holds this one: without index, feature and position (a head's place is z)."""
        return Site("z" if self.kind == "head" else self.kind, self.layer)

    def at(self, position: int | str | None) -> "Site":
        """The same site at a position or named span."""
        return replace(self, position=position)


@dataclass(frozen=True, slots=True)
class Edge:
    """A connection: what `source` writes, as `target` reads it."""

    source: Site
    target: Site

    @classmethod
    def parse(cls, text: str) -> "Edge":
        """Read `source>target` (or `source..target`)."""
        halves = re.split(r">|\.\.", text)
        if len(halves) != 2:
            raise SiteError(f"{text!r} is not an edge: write SOURCE>TARGET, such as L2.mlp>L9.h6.q")
        source, target = (Site.parse(half) for half in halves)
        if not source.key[:2] < target.key[:2]:
            raise SiteError(f"{text!r} runs backwards: {source} comes after {target} in the forward pass")
        return cls(source, target)

    def __str__(self) -> str:
        return f"{self.source}>{self.target}"

    @property
    def key(self) -> tuple[tuple[int, int, int, int, int, str], tuple[int, int, int, int, int, str]]:
        """Sorting key: by target, then by source."""
        return (self.target.key, self.source.key)

    def __lt__(self, other: "Edge") -> bool:
        return self.key < other.key


def _position_key(position: int | str | None) -> str:
    if isinstance(position, int):
        return f"{position if position >= 0 else 10**9 + position:010d}"
    return position or ""


_FORMS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"h(?P<i>\d+|\*)"), "head"),
    (re.compile(r"kv(?P<i>\d+|\*)"), "kv"),
    (re.compile(r"block"), "block"),
    *((re.compile(rf"(?:h(?P<i>\d+|\*)\.)?{kind}"), kind) for kind in PER_HEAD),
    *((re.compile(rf"(?:kv(?P<i>\d+|\*)\.)?{kind}"), kind) for kind in PER_KV),
    (re.compile(r"mlp\.n(?P<i>\d+|\*)?"), "neuron"),
    (re.compile(r"mlp\.e(?P<i>\d+|\*)?(?:\.n(?P<s>\d+))?"), "expert"),
    *((re.compile(re.escape(kind)), kind) for kind in
      ("resid.pre", "resid.mid", "resid.post", "attn.write", "mlp.write", "attn", "mlp", "router")),
]  # fmt: skip
_HINT = (
    "sites look like embed, L5.resid.post, L9.attn, L9.mlp.write, L9.h6, L9.h6.pattern, L9.kv2.k, L3.mlp.n127, L3.router, logits"
)


def _parse(text: str) -> Site:
    body, at, where = text.strip().partition("@")
    position: int | str | None = None
    if at:
        if not re.fullmatch(r"-?\d+|[A-Za-z_][\w-]*", where):
            raise SiteError(f"{text!r}: the position {where!r} is neither a number nor the name of a span")
        position = int(where) if re.fullmatch(r"-?\d+", where) else where
    feature, dictionary = None, None
    if found := re.fullmatch(r"(.*)\.f(\d+):([\w./-]+)", body):
        body, feature, dictionary = found[1], int(found[2]), found[3]
    if body in _GLOBAL:
        return Site(body, feature=feature, dictionary=dictionary, position=position)
    layered = re.fullmatch(r"L(\d+)\.(.+)", body)
    if layered is None:
        raise SiteError(f"{text!r} is not a site: {_HINT}")
    for form, kind in _FORMS:
        if found := form.fullmatch(layered[2]):
            parts = found.groupdict()
            index, sub = parts.get("i"), parts.get("s")
            return Site(kind, int(layered[1]), None if index in (None, "*") else int(index),
                        None if sub is None else int(sub), feature, dictionary, position)  # fmt: skip
    raise SiteError(f"{text!r} is not a site: nothing in a layer is called {layered[2]!r}; {_HINT}")


def matches(pattern: str, site: Site | Edge) -> bool:
    """Whether `site` fits `pattern`, where `*` stands for any index and `L2-5` for a range of layers.

    `L*.mlp` fits every MLP, `L*.h*` every head, `L0-3.h*.q` the queries of four layers.
    """
    text = str(site)
    regex = ""
    for piece in re.split(r"(L\d+-\d+|\*)", pattern.replace("..", ">")):
        if piece == "*":
            regex += r"[^.@>]+"
        elif span := re.fullmatch(r"L(\d+)-(\d+)", piece):
            regex += "L(?:" + "|".join(map(str, range(int(span[1]), int(span[2]) + 1))) + ")"
        else:
            regex += re.escape(piece)
    return re.fullmatch(regex, text) is not None


def select(patterns: str | Iterable[str], sites: Sequence[Site]) -> tuple[Site, ...]:
    """Those of `sites` that fit any of `patterns`, in forward order; a pattern that fits none is an error."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[Site] = set()
    for pattern in patterns:
        found = [site for site in sites if matches(pattern, site)]
        if not found:
            shown = ", ".join(map(str, sites[:6])) + (" ..." if len(sites) > 6 else "")
            raise SiteError(f"{pattern!r} fits none of the {len(sites)} sites there are ({shown})")
        chosen.update(found)
    return tuple(sorted(chosen))
