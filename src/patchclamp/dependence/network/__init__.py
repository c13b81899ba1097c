"""The connectome: graphs of parts, what is beyond chance in them, and how they differ by task, by token and over time."""

from patchclamp.dependence.network.communities import Communities, communities, modularity, similarity
from patchclamp.dependence.network.dissociation import Dissociation, double_dissociation
from patchclamp.dependence.network.graph import Connectome, connectome, of_matrix
from patchclamp.dependence.network.hubs import Lesion, hub_table, lesion, participation, rich_club
from patchclamp.dependence.network.moving import Factors, Moving, affinity, factorise, motifs, moving_connectome
from patchclamp.dependence.network.reuse import Overlap, edge_names, over_time, overlap
from patchclamp.dependence.network.rewiring import null_graphs, rewired

__all__ = [
    "Communities", "Connectome", "Dissociation", "Factors", "Lesion", "Moving", "Overlap", "affinity", "communities", "connectome",
    "double_dissociation", "edge_names", "factorise", "hub_table", "lesion", "modularity", "motifs", "moving_connectome", "null_graphs",
    "of_matrix", "over_time", "overlap", "participation", "rewired", "rich_club", "similarity",
]  # fmt: skip
