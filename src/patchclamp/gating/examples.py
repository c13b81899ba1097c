"""Examples for learned gates: pairs in both directions, and batches in which every answer comes equally often."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from patchclamp.errors import TaskError
from patchclamp.gating.objective import GatingSettings
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

SKEWED = 0.6  # from here on answers are called nearly constant
ONE_SIDED = 0.9  # from here on a fit learns to say one word, whatever the order of its batches


@dataclass(frozen=True, eq=False)
class Balanced:
    """Examples ready to fit on.

    Args:
        examples: with every pair's mirror, where pairs can be mirrored.
        mirrored: whether they were.
        warnings: what the reader must know about the answers.
    """

    examples: Examples
    mirrored: bool
    warnings: tuple[str, ...]

    def batches(self, size: int, *seed: int) -> Iterator[Batch]:
        """Batches without end. Answers take turns, each with its examples in random order; a pair's mirror follows it.

        So every answer comes equally often, however often the task has it.
        """
        draws = np.random.default_rng(seed)
        size = min(size, len(self.examples))
        mates = _mates(self.examples) if self.mirrored else {}
        queue = _turns(self.examples, draws)
        held: list[int] = []
        while True:
            while len(held) < size:
                one = next(queue)
                held += [one, *mates.get(one, ())]
            yield self.examples.batch(held[:size])
            held = held[size:]


def balanced(examples: Examples, settings: GatingSettings) -> Balanced:
    """Mirror the pairs where they allow it, and look at the answers.

    Raises:
        TaskError: one answer dominates, no pair can be mirrored, and `settings.one_sided` does not ask for it anyway; or
            there is nothing to fit on.
    """
    if not len(examples):
        raise TaskError(f"gating {examples.task!r} needs prompts to fit on, and there are none")
    before = examples.majority
    plain = not examples[0].answers
    mirrors = all(example.pair.invertible for example in examples)
    both = examples.mirrored() if mirrors else examples
    if plain or before < SKEWED:
        return Balanced(both, mirrors, ())
    said = f"{before:.0%} of {len(examples)} prompts of {examples.task!r} have the same answer"
    if mirrors and both.majority < SKEWED:
        return Balanced(both, True, (f"{said}: every pair was also read in the other direction, lest gates learn that answer",))
    if both.majority >= ONE_SIDED and not settings.one_sided:
        raise TaskError(
            f"{said}, and pairs cannot be mirrored: gates would learn to say that answer, not the behaviour. Give pairs whose "
            "'wrong' is right after 'corrupt', or prompts with other answers (one_sided=True fits all the same, and says so)"
        )
    advice = "batches draw every answer equally often"
    if both.majority >= ONE_SIDED:
        advice = "fitted all the same, as asked: what is found may only say that answer"
    return Balanced(both, mirrors, (f"{said}: {advice}",))


def _turns(examples: Examples, draws: np.random.Generator) -> Iterator[int]:
    """Indices without end: round after round, one of each answer; answers in random order, and each one's examples too."""
    classes: dict[object, list[int]] = {}
    for index, example in enumerate(examples):
        classes.setdefault(example.answers, []).append(index)
    queues: dict[object, list[int]] = {answer: [] for answer in classes}
    keys = list(classes)
    while True:
        for place in draws.permutation(len(keys)):
            key = keys[place]
            if not queues[key]:
                queues[key] = [classes[key][i] for i in draws.permutation(len(classes[key]))]
            yield queues[key].pop()


def _mates(examples: Examples) -> dict[int, tuple[int, ...]]:
    """Where each example's mirror is."""
    where = {example.key: index for index, example in enumerate(examples)}
    found = {index: where.get(example.mirror().key) for index, example in enumerate(examples)}
    return {index: (mate,) for index, mate in found.items() if mate is not None and mate != index}
