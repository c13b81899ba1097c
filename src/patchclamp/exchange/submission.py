"""A submission to the circuit-localisation track of MIB: a folder per task and model, with all scores or with nine circuits.

    ioi_gpt2/importances.json        the scores of every edge (or node), from which the benchmark takes its circuits itself (or .pt)
    ioi_gpt2/0.001.json ... 0.5.json nine circuits, each of at most that share of the edges

Files are told apart by what they hold and not by their names when they are read (https://arxiv.org/abs/2504.13151).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError
from patchclamp.exchange.graph import Graph, load_graph, nodes_of, save_graph, to_graph
from patchclamp.exchange.names import Sizes, edge_name, edge_names
from patchclamp.scores import Scores
from patchclamp.sites import Edge

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""The nine sizes; the tenth is the whole model."""
SUFFIXES = (".json", ".pt")
"""What is read; what is written is JSON."""


@dataclass(frozen=True, eq=False)
class Submission:
    """One cell.

    Attributes:
        scores: where the cell has importances.json.
        circuits: by share, where it has nine circuits.
    """

    scores: Scores | None
    circuits: Mapping[float, Circuit] | None


def write_submission(
    folder: Path, sizes: Sizes, scores: Scores | None = None, circuits: Mapping[float, Circuit] | None = None
) -> tuple[Path, ...]:
    """Write one cell: scores, or nine circuits.

    Args:
        folder: of the cell, called TASK_MODEL; it is made.
        sizes: of the model.
        scores: of all parts.
        circuits: one for each of `SHARES`, of edges or of nodes.

    Raises:
        PatchclampError: both or neither is given; not nine circuits; a circuit larger than its share.
    """
    if (scores is None) == (circuits is None):
        raise PatchclampError("a cell of a submission holds scores or nine circuits: give one of the two")
    bodies = {"importances.json": to_graph(sizes, scores)} if scores is not None else {}
    if circuits is not None:
        if sorted(circuits) != sorted(SHARES):
            raise PatchclampError(
                f"circuits of the shares {sorted(circuits)} were given: a submission has one for each of {SHARES}"
            )
        for share, circuit in circuits.items():
            size, most = size_of(circuit, sizes), max(1, int(share * count_of(circuit, sizes) + 1e-9))
            if size > most:
                raise PatchclampError(f"the circuit of share {share} has {size} parts, and at most {most} are allowed")
            bodies[f"{share}.json"] = to_graph(sizes, None, circuit)
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(save_graph(folder / name, body) for name, body in bodies.items())


def read_submission(folder: Path, kv_heads: int | None = None) -> Submission:
    """Read one cell back.

    Raises:
        PatchclampError: no such folder, no graph file in it, scores beside circuits, or two circuits of one share.
    """
    if not folder.is_dir():
        raise PatchclampError(f"there is no folder {folder}: a cell of a submission is a folder called TASK_MODEL")
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise PatchclampError(f"{folder} has no .json or .pt file: a cell holds importances.json, or nine circuits")
    found = {path.name: load_graph(path, kv_heads) for path in files}
    scored = {name: graph for name, graph in found.items() if graph.scores is not None}
    if scored and len(found) > 1:
        raise PatchclampError(f"{folder} has scores ({', '.join(scored)}) beside other files: a cell holds scores, or circuits")
    if scored:
        return Submission(next(iter(scored.values())).scores, None)
    circuits: dict[float, Circuit] = {}
    for name, graph in found.items():
        share, circuit = _share(name, graph)
        if share in circuits:
            raise PatchclampError(f"{folder} has two circuits of at most {share} of the parts: {name} is the second")
        circuits[share] = circuit
    return Submission(None, dict(sorted(circuits.items())))


def _share(name: str, graph: Graph) -> tuple[float, Circuit]:
    """The smallest of the shares that a circuit fits into; as its name says, where that is one of them and it fits."""
    circuit = graph.circuit or Circuit([])
    named = [share for share in SHARES if name.rpartition(".")[0] == str(share)]
    size = size_of(circuit, graph.sizes)
    fitting = [share for share in SHARES if size <= max(1, int(share * count_of(circuit, graph.sizes) + 1e-9))]
    if not fitting:
        raise PatchclampError(
            f"{name} has {size} parts, more than half of all: the largest circuit of a submission has at most half"
        )
    return (named[0] if named and named[0] in fitting else fitting[0]), circuit


def size_of(circuit: Circuit, sizes: Sizes) -> int:
    """How many edges the benchmark counts in it: those into shared keys and values once for each head that reads them."""
    return sum(len(edge_name(part, sizes)) if isinstance(part, Edge) else 1 for part in circuit)


def count_of(circuit: Circuit, sizes: Sizes) -> int:
    """How many parts a model has for the benchmark: edges, or nodes where the circuit is of these."""
    of_edges = any(isinstance(part, Edge) for part in circuit) or not len(circuit)
    return len(edge_names(sizes)) if of_edges else len(nodes_of(sizes)) - 2
