"""Bench: the circuit-localisation protocol of MIB (Mueller et al. 2025, https://arxiv.org/abs/2504.13151) on any model and task.

Scores are made on the fit set; circuits of ten sizes are judged on the confirm set, which chose nothing:

    CPR = area under faithfulness, parts taken by signed score        higher is better, and not bounded by 1
    CMD = area between faithfulness and 1, parts taken by |score|     lower is better, 0 is perfect

A cell is done where the model is right in three quarters of pairs. On planted models, whose circuit is known, methods are judged by
AUROC as well (`planted`).
"""

from patchclamp.bench.planted import live, planted
from patchclamp.bench.protocol import Bench, bench, cells, judged, sizes_of, submitted

__all__ = ["Bench", "bench", "cells", "judged", "live", "planted", "sizes_of", "submitted"]
