"""Compiled programs: transformers whose every weight follows from a small program, so that their circuits are known.

one = program("hist")
one.hf, one.tokenizer, one.task     # what any other model has
one.truth.zero                      # the edges that matter when one of them carries zero
one.blueprint                       # the weights in numpy
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from patchclamp.tasks import Task
from patchclamp.zoo.compiled.programs import PROGRAMS, Program, program_named
from patchclamp.zoo.compiled.tasks import task
from patchclamp.zoo.compiled.transformer import tokenizer, transformer
from patchclamp.zoo.compiled.truth import Truth, truth_of
from patchclamp.zoo.compiled.weights import Blueprint, compile_program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from patchclamp.models.normless import NormlessForCausalLM

__all__ = ["Compiled", "build", "program_names"]

PAIRS = 32
"""Pairs on which live edges are looked for."""


def program_names() -> tuple[str, ...]:
    """The programs there are."""
    return tuple(PROGRAMS)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled program.

    Attributes:
        program: what it computes, on which inputs.
        blueprint: its weights in plain arrays.
        hf: the transformers model, in float64, in evaluation mode.
        tokenizer: one token a word.
        task: pairs of inputs with different outputs.
    """

    program: Program
    blueprint: Blueprint = field(repr=False)
    hf: "NormlessForCausalLM" = field(repr=False)
    tokenizer: "PreTrainedTokenizerFast" = field(repr=False)
    task: Task = field(repr=False)

    @cached_property
    def truth(self) -> Truth:
        """Structural edges, and those that are live under zero and under resample on pairs of the task."""
        examples = self.task.examples(self.tokenizer, PAIRS)
        return truth_of(self.blueprint, *(np.array([one.clean for one in examples]), np.array([one.corrupt for one in examples])))


def build(name: str) -> Compiled:
    """See `patchclamp.zoo.program`."""
    found = program_named(name)
    blueprint = compile_program(found)
    words = tokenizer(blueprint.vocabulary)
    words.model_max_length = len(blueprint.positions)
    return Compiled(found, blueprint, transformer(blueprint), words, task(name))
