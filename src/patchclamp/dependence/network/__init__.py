"""The connectome: graphs of parts, what is beyond chance in them, and how they differ by task, by token and over time."""

from patchclamp.dependence.network.attention_parts import (
    Suppressed,
    cooperation,
    deconstruct,
    position_dependence,
    suppress_recency,
)
from patchclamp.dependence.network.communities import Communities, communities, modularity, similarity
from patchclamp.dependence.network.dissociation import Dissociation, double_dissociation
from patchclamp.dependence.network.experts import activity, balanced_partition, coactivation, inside_share, moefied
from patchclamp.dependence.network.graph import Connectome, connectome, of_matrix
from patchclamp.dependence.network.hubs import Lesion, hub_table, lesion, participation, rich_club
from patchclamp.dependence.network.moving import Factors, Moving, affinity, factorise, motifs, moving_connectome
from patchclamp.dependence.network.reuse import Overlap, edge_names, over_time, overlap
from patchclamp.dependence.network.rewiring import null_graphs, rewired

__all__ = [
    "Communities",
    "Connectome",
    "Dissociation",
    "Factors",
    "Lesion",
    "Moving",
    "Overlap",
    "Suppressed",
    "activity",
    "affinity",
    "balanced_partition",
    "coactivation",
    "communities",
    "connectome",
    "cooperation",
    "deconstruct",
    "double_dissociation",
    "edge_names",
    "factorise",
    "hub_table",
    "inside_share",
    "lesion",
    "modularity",
    "moefied",
    "motifs",
    "moving_connectome",
    "null_graphs",
    "of_matrix",
    "over_time",
    "overlap",
    "participation",
    "position_dependence",
    "rewired",
    "rich_club",
    "similarity",
    "suppress_recency",
]
