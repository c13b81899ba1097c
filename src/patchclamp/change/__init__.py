"""Change: lasting changes of a model. Gates folded into its weights, and what else that changes."""

from patchclamp.change.fold import Folded, fold
from patchclamp.change.side_effects import side_effects, text_effects
from patchclamp.change.write import write_checkpoint

__all__ = ["Folded", "fold", "side_effects", "text_effects", "write_checkpoint"]
