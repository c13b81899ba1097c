"""Graph files: scores and circuits as EAP-IG and the circuit-localisation benchmark write them, as JSON or with tensors (`.pt`).

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {"a0.h1": {"in_graph": true, "score": 0.1}, ...},
     "edges": {"a0.h1->m0": {"score": 0.1, "in_graph": true}, ...}}

A key/value head that several query heads read is one part here and several edges there: what is written gives each of them an
equal share of the score, what is read adds them up. What is written is JSON. The other form holds the same in matrices,

    {"cfg", "src_nodes": [...], "dst_nodes": ["a0.h0<q>", ...], "edges_scores": [source, reader], "edges_in_graph",
     "nodes_in_graph": [source], "nodes_scores": [source], where there are any; NaN: not scored}

and is read by torch's reader of weights alone, which makes tensors, numbers, text and containers and refuses whatever would run.
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
    if not all(isinstance(body.get(name), Mapping) for name in ("cfg", "nodes", "edges")):
        raise PatchclampError("a graph file has the fields cfg, nodes and edges, each a mapping: this has not")
    sizes = _sizes(body["cfg"], kv_heads)
    edges = {name: _row(name, row) for name, row in body["edges"].items()}
    nodes = {part_of(name, sizes): _row(name, row, unscored=True) for name, row in body["nodes"].items()}
    parts = {site: row for site, row in nodes.items() if site.kind not in ("embed", "logits")}
    values, inside, about = dict[Any, float](), set[Any](), {"from": "graph file"}
    if of_nodes := not any(score for score, _ in edges.values()) and any(score is not None for score, _ in parts.values()):
        values |= {site: score for site, (score, _) in parts.items() if score is not None}
    if of_nodes or not edges:
        inside = {site for site, (_, chosen) in parts.items() if chosen}
    else:
        for name, (score, chosen) in edges.items():
            edge = edge_of(name, sizes)
            if score is not None:
                values[edge] = values.get(edge, 0.0) + score
            inside |= {edge} if chosen else set()
    order = sorted(values, key=lambda part: part.key)
    scored = of_nodes or any(values.values())
    return Graph(
        sizes,
        Scores.of(order, [values[part] for part in order], about) if scored else None,
        Circuit(inside, about) if inside else None,
    )


def _sizes(config: Mapping[str, Any], kv_heads: int | None) -> Sizes:
    """The model's sizes, as far as a file says them."""
    missing = [name for name in ("n_layers", "n_heads", "d_model") if not isinstance(config.get(name), int)]
    if missing:
        raise PatchclampError(f"a graph file's cfg says {', '.join(missing)}: this one does not, or not as a whole number")
    heads = int(config["n_heads"])
    return Sizes(int(config["n_layers"]), heads, kv_heads or heads, int(config["d_model"]), bool(config.get("parallel_attn_mlp")))


def _row(name: str, row: Any, unscored: bool = False) -> tuple[float | None, bool]:
    """Score and whether it is in the graph; where it may be unscored, NaN is no score."""
    if not isinstance(row, Mapping):
        raise PatchclampError(f"{name!r} of a graph file is a mapping with in_graph and score: this is {type(row).__name__}")
    score = row.get("score")
    if unscored and isinstance(score, float) and math.isnan(score):
        score = None
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
    """Read a graph file, JSON or `.pt`; see `from_graph`.

    Raises:
        PatchclampError: there is no such file, or it is none of the two.
    """
    if path.suffix == ".pt":
        return from_graph(_unpacked(path, _tensors(path)), kv_heads)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PatchclampError(f"{path} cannot be read as a graph file: {error}") from error
    if not isinstance(body, Mapping):
        raise PatchclampError(f"{path} is no graph file: it holds a {type(body).__name__}")
    return from_graph(body, kv_heads)  # pyright: ignore[reportUnknownArgumentType]


def _tensors(path: Path) -> Mapping[str, Any]:
    """What a file of tensors holds, without running anything that is in it."""
    import pickle

    import torch

    try:
        body = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise PatchclampError(
            f"{path} cannot be read as a graph file, of which tensors, numbers, text and containers are read and nothing is run: {said[0]}"
        ) from error
    if not isinstance(body, Mapping):
        raise PatchclampError(f"{path} is no graph file: it holds a {type(body).__name__}")
    return body  # pyright: ignore[reportUnknownVariableType]


def _unpacked(path: Path, body: Mapping[str, Any]) -> dict[str, Any]:
    """The matrices of a `.pt` file as the body of a JSON one: its real edges by their names."""
    sources, readers = (list(body.get(name) or ()) for name in ("src_nodes", "dst_nodes"))
    shape = (len(sources), len(readers))
    tables = {"edges_scores": shape, "edges_in_graph": shape, "nodes_in_graph": shape[:1], "nodes_scores": shape[:1]}
    found: dict[str, Any] = {}
    if not isinstance(body.get("cfg"), Mapping):
        raise PatchclampError(f"{path} is no graph file: it has no cfg that says the model's sizes")
    for name, wanted in tables.items():
        if name not in body and name == "nodes_scores":
            continue
        size = tuple(getattr(body.get(name), "shape", ()))
        if not all(shape) or size != wanted:
            raise PatchclampError(
                f"{path} is no graph file: {name} is to be a tensor of {' x '.join(map(str, wanted))} (src_nodes, dst_nodes), and is "
                f"{' x '.join(map(str, size)) or 'missing'}"
            )
        found[name] = body[name].tolist()
    place = {f"{source}->{reader}": (at, to) for at, source in enumerate(sources) for to, reader in enumerate(readers)}
    real = edge_names(_sizes(body["cfg"], None))
    if missing := [name for name in real if name not in place]:
        raise PatchclampError(f"{path} is no graph file: src_nodes and dst_nodes leave out {missing[0]}, an edge of its model")
    scores, inside = found["edges_scores"], found["edges_in_graph"]
    edges = {
        name: {"score": float(scores[at][to]), "in_graph": bool(inside[at][to])} for name in real for at, to in [place[name]]
    }
    nodes: dict[str, dict[str, Any]] = {
        name: {"in_graph": bool(chosen)} for name, chosen in zip(sources, found["nodes_in_graph"], strict=True)
    }
    for name, score in zip(sources, found.get("nodes_scores", ()), strict=False):
        nodes[name]["score"] = float(score)
    return {"cfg": body["cfg"], "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}
