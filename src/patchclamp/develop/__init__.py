"""Develop: one training's checkpoints, measured and mapped: when roles form, what they go with, whether they stay.

>>> from patchclamp.develop import checkpoints, follow
>>> found, folder = follow(checkpoints("runs/induction"), tasks=["induction"])   # doctest: +SKIP
>>> found.lives.select("site", "formed", "word")                                 # doctest: +SKIP

Each map is a run like those of `patchclamp map`, made by `patchclamp sweep`: here, or on Ray.
"""

from patchclamp.develop.checkpoints import Checkpoint, checkpoints
from patchclamp.develop.follow import Development, follow, load_development
from patchclamp.develop.lives import lives

__all__ = ["Checkpoint", "Development", "checkpoints", "follow", "lives", "load_development"]
