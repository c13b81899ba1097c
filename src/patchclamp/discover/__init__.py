"""From scores to a circuit: the fewest parts, best first, that keep the behaviour."""

from patchclamp.discover.threshold import Curve, discover, faithfulness_curve, sizes_of

__all__ = ["Curve", "discover", "faithfulness_curve", "sizes_of"]
