"""From scores to a circuit: the fewest parts, best first, that keep the behaviour; and how faithful circuits of every size are."""

from patchclamp.discover.acdc import Acdc, acdc
from patchclamp.discover.evaluation import Evaluation, evaluate, evaluate_circuits
from patchclamp.discover.greedy import Greedy, greedy
from patchclamp.discover.masks import Mask, MaskSettings, probe, prune
from patchclamp.discover.missed import Missed, missed
from patchclamp.discover.pruning import grown, pruned, rank_auroc
from patchclamp.discover.recall import Recall, verified_recall
from patchclamp.discover.screen import Screened, screened
from patchclamp.discover.threshold import Curve, discover, faithfulness_curve, sizes_of

__all__ = [
    "Acdc",
    "Curve",
    "Evaluation",
    "Greedy",
    "Mask",
    "MaskSettings",
    "Missed",
    "Recall",
    "Screened",
    "acdc",
    "discover",
    "evaluate",
    "evaluate_circuits",
    "faithfulness_curve",
    "greedy",
    "grown",
    "missed",
    "probe",
    "prune",
    "pruned",
    "rank_auroc",
    "screened",
    "sizes_of",
    "verified_recall",
]
