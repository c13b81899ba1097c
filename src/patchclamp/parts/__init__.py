"""Parts: the gated things of one granularity. Everything that Patchclamp finds, it finds through this contract.

A part has a gate: open (1) it passes its value, closed (0) a fallback, between the mixture
`value' = fallback + gate * (value - fallback)`.
"""

from patchclamp.parts.benefits import benefits
from patchclamp.parts.contract import Gates, Parts, sites_of
from patchclamp.parts.edges import Edges, edges
from patchclamp.parts.fallbacks import FALLBACKS, Fallback
from patchclamp.parts.gated import Gated, gated
from patchclamp.parts.neurons import neurons
from patchclamp.parts.nodes import Nodes, nodes
from patchclamp.parts.tied import Tied, tied

__all__ = [
    "FALLBACKS", "Edges", "Fallback", "Gated", "Gates", "Nodes", "Parts", "Tied", "benefits", "edges", "gated", "neurons", "nodes",
    "sites_of", "tied",
]  # fmt: skip
