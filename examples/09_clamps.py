"""What does an induction head wait for? Each piece is clamped on or off from the start. Verdicts need several seeds."""

# long: 9 trainings of about 75 s of one core each; docs/clamps.md has five seeds of them: python 09_clamps.py FOLDER 0 1 2 3 4

import sys
from pathlib import Path

from patchclamp.models.model import Model
from patchclamp.training import Training
from patchclamp.training.clamps import Copy, Forbid, Force
from patchclamp.training.counterfactual import counterfactual, repeated
from patchclamp.zoo.recipes.induction import Repeats, build

ARMS = {
    "previous-on": [Force("L0.h0.pattern", "previous")],
    "previous-off": [Forbid("L0.h*.pattern", "previous")],
    "match-on": [Force("L1.h0.pattern", "induction")],
    "copy-on": [Copy("L1.h0.pattern")],
    "previous-and-copy-on": [Force("L0.h0.pattern", "previous"), Copy("L1.h0.pattern")],
    "self-on": [Force("L0.h3.pattern", "self")],
    "uniform-on": [Force("L0.h3.pattern", "uniform")],
    "later-self-on": [Force("L1.h3.pattern", "self")],
}
numbers = Training(
    400, batch=32, rate=3e-3, schedule="constant", warmup=20, betas=(0.9, 0.98), decay=0.01, evaluate=8, checkpoints=(0,)
)
found = counterfactual(
    lambda seed: Model.load(build(seed)), lambda seed: Repeats(seed, length=34, lead=2, shortest=12, longest=16), numbers, ARMS,
    Path(sys.argv[1] if len(sys.argv) > 1 else "runs/clamps"), seeds=[int(seed) for seed in sys.argv[2:]] or (0,),
    weights=repeated, rows=64,
)  # fmt: skip
print(found.table.select("arm", "seed", "step", "width", "crossing", "last", "free"))
print(found.arms)
