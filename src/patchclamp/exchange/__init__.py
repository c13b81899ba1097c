"""Exchange: names, circuits and scores as other tools write them, and back.

TransformerLens' hook names (`names`), the graph files of EAP-IG and of the circuit-localisation benchmark MIB (`graph`), and a
benchmark's submission folder (`submission`).
"""

from patchclamp.exchange.graph import Graph, from_graph, load_graph, save_graph, to_graph
from patchclamp.exchange.names import Sizes, edge_name, edge_of, hook_of, part_name, part_of, site_of
from patchclamp.exchange.submission import Submission, read_submission, write_submission

__all__ = [
    "Graph", "Sizes", "Submission", "edge_name", "edge_of", "from_graph", "hook_of", "load_graph", "part_name", "part_of",
    "read_submission", "save_graph", "site_of", "to_graph", "write_submission",
]  # fmt: skip
