"""Graph files: scores and circuits as EAP-IG and the circuit-localisation benchmark write them, as JSON.

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {"a0.h1": {"in_graph": true, "score": 0.1}, ...},
     "edges": {"a0.h1->m0": {"score": 0.1, "in_graph": true}, ...}}

A key/value head that several query heads read is one part here and several edges there: what is written gives each of them an
equal share of the score, what is read adds them up. Only JSON is read: the other form (`.pt`) is a pickle, which could run
anything.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError
from patchclamp.exchange.names import Sizes, edge_name, edge_names, edge_of, part_name, part_of
from patchclamp.scores import Scores
from patchclamp.sites import Edge, Site


@dataclass(frozen=True, eq=False)
class Graph:
    """What a graph file holds.

    Attributes:
        sizes: of the model, as far as the file says (`kv_heads` is given by whoever reads it).
        scores: of edges, or of nodes where only these have any; None where nothing is scored.
        circuit: the parts marked as in the graph; None where none is.
    """

    sizes: Sizes
    scores: Scores | None
    circuit: Circuit | None


def to_graph(sizes: Sizes, scores: Scores | None = None, circuit: Circuit | None = None) -> dict[str, Any]:
    """Scores, a circuit, or both, as a graph file's body.

    Every node and edge of the model is in it; those that are not scored have the score 0. Signs: ours are positive where the part
    helps (closing it takes from the behaviour), which is EAP-IG's sign for a loss of minus the metric.

    Raises:
        PatchclampError: nothing is given, or scores of edges and of nodes are mixed.
        SiteError: a part that has no name there (a position, a neuron).
    """
    if scores is None and circuit is None:
        raise PatchclampError("a graph file holds scores or a circuit, and neither was given")
    parts = [*(scores.sites if scores is not None else ()), *(circuit or ())]
    of_edges = [isinstance(part, Edge) for part in parts]
    if any(of_edges) and not all(of_edges):
        raise PatchclampError("a graph file is of edges or of nodes: these scores and circuit have both")
    values = {} if scores is None else dict(zip(scores.sites, map(float, scores.values()), strict=True))
    inside = set() if circuit is None else circuit.sites
    config = {"n_layers": sizes.layers, "n_heads": sizes.heads, "parallel_attn_mlp": sizes.parallel, "d_model": sizes.width}
    if any(of_edges):
        return {"cfg": config, **_edges_body(sizes, values, {part for part in inside if isinstance(part, Edge)})}
    nodes: dict[str, dict[str, Any]] = {}
    for site in nodes_of(sizes):
        nodes[part_name(site)] = {"in_graph": site in inside or site.kind in ("embed", "logits")}
        if site in values:
            nodes[part_name(site)]["score"] = values[site]
    strange = [part for part in {*values, *inside} if isinstance(part, Site) and part not in nodes_of(sizes)]
    if strange:
        raise PatchclampError(f"{strange[0]} is no node of a model of {sizes.layers} layers of {sizes.heads} heads")
    return {"cfg": config, "nodes": nodes, "edges": {}}


def _edges_body(sizes: Sizes, values: Mapping[Any, float], inside: set[Edge]) -> dict[str, Any]:
    edges = {name: {"score": 0.0, "in_graph": False} for name in edge_names(sizes)}
    for edge in {*values, *inside}:
        names = edge_name(edge, sizes)
        for name in names:
            if name not in edges:
                raise PatchclampError(f"{edge} is no edge of a model of {sizes.layers} layers of {sizes.heads} heads")
            edges[name] = {"score": values.get(edge, 0.0) / len(names), "in_graph": edge in inside}
    kept = {part_name(part) for edge in inside for part in (edge.source, *_readers(edge, sizes))}
    nodes = {part_name(site): {"in_graph": part_name(site) in kept or site.kind == "logits"} for site in nodes_of(sizes)}
    return {"nodes": nodes, "edges": edges}


def _readers(edge: Edge, sizes: Sizes) -> Sequence[Site]:
    return [part_of(name.partition("->")[2].partition("<")[0], sizes) for name in edge_name(edge, sizes)]


def nodes_of(sizes: Sizes) -> tuple[Site, ...]:
    """Every node, the input first and the logits last."""
    found = [Site("embed")]
    for layer in range(sizes.layers):
        found += [*(Site("head", layer, head) for head in range(sizes.heads)), Site("mlp", layer)]
    return (*found, Site("logits"))


def from_graph(body: Mapping[str, Any], kv_heads: int | None = None) -> Graph:
    """What a graph file's body says.

    Args:
        body: as `to_graph` makes it.
        kv_heads: key/value heads of the model; by default as many as heads. Edges into one key/value head are then one edge, with
            their scores added up; it is in the circuit where any of them is.

    Raises:
        PatchclampError: it is no graph file; a score is no number.
        SiteError: a name that the model has not.
    """
    config = body.get("cfg")
    if not isinstance(config, Mapping) or not all(isinstance(body.get(name), Mapping) for name in ("nodes", "edges")):
        raise PatchclampError("a graph file has the fields cfg, nodes and edges, each a mapping: this has not")
    missing = [name for name in ("n_layers", "n_heads", "d_model") if not isinstance(config.get(name), int)]
    if missing:
        raise PatchclampError(f"a graph file's cfg says {', '.join(missing)}: this one does not, or not as a whole number")
    heads = int(config["n_heads"])
    sizes = Sizes(
        int(config["n_layers"]), heads, kv_heads or heads, int(config["d_model"]), bool(config.get("parallel_attn_mlp"))
    )
    values, inside = dict[Any, float](), set[Any]()
    for name, row in body["edges"].items():
        edge, (score, chosen) = edge_of(name, sizes), _row(name, row)
        if score is not None:
            values[edge] = values.get(edge, 0.0) + score
        inside |= {edge} if chosen else set()
    about = {"from": "graph file"}
    if not body["edges"]:
        for name, row in body["nodes"].items():
            score, chosen = _row(name, row)
            site = part_of(name, sizes)
            if score is not None and site.kind not in ("embed", "logits"):
                values[site] = score
            inside |= {site} if chosen and site.kind not in ("embed", "logits") else set()
    order = sorted(values, key=lambda part: part.key)
    scored = bool(order) and (not body["edges"] or any(values.values()))
    return Graph(
        sizes,
        Scores.of(order, [values[part] for part in order], about) if scored else None,
        Circuit(inside, about) if inside else None,
    )


def _row(name: str, row: Any) -> tuple[float | None, bool]:
    if not isinstance(row, Mapping):
        raise PatchclampError(f"{name!r} of a graph file is a mapping with in_graph and score: this is {type(row).__name__}")
    score = row.get("score")
    if score is not None and (not isinstance(score, int | float) or not math.isfinite(score)):
        raise PatchclampError(f"{name!r} of a graph file has the score {score!r}: expected a number")
    return (None if score is None else float(score)), bool(row.get("in_graph", False))


def save_graph(path: Path, body: Mapping[str, Any]) -> Path:
    """Write a graph file: to a hidden name first, then as a whole."""
    hidden = path.with_name(f".{path.name}.new")
    try:
        hidden.write_text(json.dumps(body, allow_nan=False), encoding="utf-8")
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
    return path


def load_graph(path: Path, kv_heads: int | None = None) -> Graph:
    """Read a graph file; see `from_graph`.

    Raises:
        PatchclampError: there is no such file, or it is no JSON.
    """
    if path.suffix == ".pt":
        raise PatchclampError(
            f"{path.name} is a pickle, which could run anything: write the graph as JSON (Graph.to_json) instead"
        )
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PatchclampError(f"{path} cannot be read as a graph file: {error}") from error
    if not isinstance(body, Mapping):
        raise PatchclampError(f"{path} is no graph file: it holds a {type(body).__name__}")
    return from_graph(body, kv_heads)  # pyright: ignore[reportUnknownArgumentType]
