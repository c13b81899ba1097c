"""Association: what parts' outputs have in common over tokens and prompts, beside what intervention says."""

from patchclamp.dependence.association.composition import attention_row, composed, log_ratio_partial
from patchclamp.dependence.association.information import gaussian, ksg
from patchclamp.dependence.association.kernels import cka, coco, linear_gram, unbiased_hsic
from patchclamp.dependence.association.layers import DimensionUse, dimension_use, layer_dependence, rank_curve, rank_residual
from patchclamp.dependence.association.measuring import MEASURES, associate, association
from patchclamp.dependence.association.neural import Estimate, neural_information
from patchclamp.dependence.association.partial import partial_correlations, stability, support, support_by_ebic
from patchclamp.dependence.association.plane import akde, ebab, information_plane
from patchclamp.dependence.association.recording import Recorded, recorded, stream
from patchclamp.dependence.association.shape import Representation, bures, embedded, regressed, shape_distance, shape_distances
from patchclamp.dependence.association.table import Association
from patchclamp.scores.kernels import gaussian_gram, hsic

__all__ = [
    "MEASURES",
    "Association",
    "DimensionUse",
    "Estimate",
    "Recorded",
    "Representation",
    "akde",
    "associate",
    "association",
    "attention_row",
    "bures",
    "cka",
    "coco",
    "composed",
    "dimension_use",
    "ebab",
    "embedded",
    "gaussian",
    "gaussian_gram",
    "hsic",
    "information_plane",
    "ksg",
    "layer_dependence",
    "linear_gram",
    "log_ratio_partial",
    "neural_information",
    "partial_correlations",
    "rank_curve",
    "rank_residual",
    "recorded",
    "regressed",
    "shape_distance",
    "shape_distances",
    "stability",
    "stream",
    "support",
    "support_by_ebic",
    "unbiased_hsic",
]
