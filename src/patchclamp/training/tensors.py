"""Which tensors or layers a fine-tuning changes, when, and what that spares the optimizer.

Tensors by their condition number (`units.condition`: `chosen`), layers by how far they last moved. Papers: The Condition Number as a
Scale-Invariant Proxy for Information Encoding in Neural Units, https://arxiv.org/abs/2506.16289 (P226); Ardakani et al. 2023, SlimFit,
https://arxiv.org/abs/2305.18513 (P246).
"""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from itertools import pairwise

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.training.clamps import Freeze, Schedule
from patchclamp.training.plan import Training
from patchclamp.units.condition import changes, frozen


@contextmanager
def learning(model: Model, names: Collection[str]) -> Generator[None]:
    """While open, these tensors alone require gradients, and the optimizer of a training keeps moments of no other:

        with learning(model, chosen(condition(model), 8)):
            train(model, data, training, out)

    Args:
        model: it is left as it was found.
        names: of parameters, as `units.condition` names them.

    Raises:
        TrainingError: no names, or one that the model does not have. (One expert of a fused tensor cannot learn alone in this way:
            hold the others by `clamps.Freeze`.)
    """
    known = dict(model.hf.named_parameters())
    if unknown := sorted(set(names) - set(known)):
        raise TrainingError(
            f"{unknown[0]} was to learn, and {model.name} has no tensor of that name: it has {next(iter(known))}, ..."
        )
    if not names:
        raise TrainingError("no tensors were given that should learn: name some")
    before = {name: one.requires_grad for name, one in known.items()}
    try:
        for name, one in known.items():
            one.requires_grad_(name in names)
        yield
    finally:
        for name, one in known.items():
            one.requires_grad_(before[name])


def optimizer_bytes(model: Model, training: Training) -> int:
    """What an optimizer keeps of the weights that require gradients: AdamW two moments of each and a step of 4 bytes a tensor, SGD
    one, where it has momentum. Plain arithmetic; nothing is run."""
    trained = [one for one in model.hf.parameters() if one.requires_grad]
    size = sum(one.numel() * one.element_size() for one in trained)
    return 2 * size + 4 * len(trained) if training.optimizer == "adamw" else size * (training.betas[0] > 0)


def freezing(checkpoints: Mapping[int, Model], share: float) -> tuple[Freeze, ...]:
    """When which layers are frozen, from a pilot run: between one checkpoint and the next, those that moved least before

        distance(layer) = sum |W(s_i) - W(s_i-1)| / sum |W(s_i-1)|

    frozen from s_i to s_i+1, as a share of all layers; behind the last checkpoint to the end. Until s_1 all learn. SlimFit decides
    during the run itself and gathers the distances as it goes; here a pilot run (a short one, or of other rows) is read, so that what is
    frozen is known before the run begins, and belongs to its identity.

    Args:
        checkpoints: of the pilot by step, at least two.
        share: of the layers, rounded down.

    Returns:
        Clamps, one for each interval in which something is frozen. The optimizer has moments of frozen layers all the same: the bytes
        that their absence would spare are `spared`.

    Cost: a pass over the weights for each pair of checkpoints.

    Raises:
        TrainingError: fewer than two checkpoints, or an end that is no more than the beginning.
        MeasureError: checkpoints of different models, a share outside 0 to 1.
    """
    steps = sorted(checkpoints)
    if len(steps) < 2 or steps[0] < 0:
        raise TrainingError(f"layers move between checkpoints, and those of steps {steps} were given: give at least two")
    ends: list[int | None] = [*steps[2:], None]
    found: list[Freeze] = []
    for (one, two), end in zip(pairwise(steps), ends, strict=True):
        still = frozen([changes(checkpoints[one], checkpoints[two])], share)
        if still:
            found.append(Freeze(tuple(f"L{layer}.block" for layer in still), Schedule(start=two, stop=end)))
    return tuple(found)


def spared(model: Model, clamps: Collection[Freeze], training: Training) -> float:
    """Share of the optimizer's moments that belong to wholly frozen parts, on average over the updates of a training: what need not be
    kept in memory, were frozen parts' moments put aside. Cost: a sum over the parts' sizes for each update.

    Raises:
        SiteError: a clamp of a part that the model lacks.
    """
    from patchclamp.training.clamps.places import plain
    from patchclamp.training.clamps.slices import slices

    trained = {id(one): one.numel() for one in model.hf.parameters() if one.requires_grad}
    whole = sum(trained.values())
    if not whole:
        raise TrainingError(f"{model.name} has no weights that require gradients: there is nothing to spare")
    total = 0
    for step in range(training.steps):
        held = {piece.parameter: 0 for clamp in clamps if clamp.schedule(step) == 1
                for piece in slices(model, plain(clamp.parts)) if piece.index is None}  # fmt: skip
        total += sum(trained.get(id(one), 0) for one in held)
    return total / whole / training.steps
