"""From scores to a circuit: the fewest parts, best first, that keep the behaviour; and how faithful circuits of every size are."""

from patchclamp.discover.acdc import Acdc, acdc
from patchclamp.discover.evaluation import Evaluation, evaluate
from patchclamp.discover.pruning import grown, pruned, rank_auroc
from patchclamp.discover.threshold import Curve, discover, faithfulness_curve, sizes_of

__all__ = [
    "Acdc",
    "Curve",
    "Evaluation",
    "acdc",
    "discover",
    "evaluate",
    "faithfulness_curve",
    "grown",
    "pruned",
    "rank_auroc",
    "sizes_of",
]
