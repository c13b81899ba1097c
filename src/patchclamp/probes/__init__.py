"""Probes: what a subspace of a site's values carries, shown by exchanging it between prompts.

Whether a direction acts through what it correlates with, or wakes a dormant pathway (`illusion`); a subspace that is learned, with its
controls (`align`); what mediates a change of operands or operators (`mediation`).
"""

from patchclamp.probes.alignment import Aligned, align
from patchclamp.probes.illusion import Illusion, illusion
from patchclamp.probes.mediation import Mediated, mediation
from patchclamp.probes.subspace import Swap, orthonormal, reader_of, split

__all__ = ["Aligned", "Illusion", "Mediated", "Swap", "align", "illusion", "mediation", "orthonormal", "reader_of", "split"]
