"""Where arithmetic happens: which places must see the operands, and which parts, put in from other operands, change the answer.

Stolfo, Belinkov and Sachan 2023, https://arxiv.org/abs/2305.15054: attention moves operands to the last token, where late MLPs make
the result; what is only retrieved does not need these. Effects are exact: other operands' values put in, attention cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.models.editing import Edits
from patchclamp.probes import mediation
from patchclamp.probes.mediation import Mediated
from patchclamp.scores import Part
from patchclamp.sites import Site
from patchclamp.tasks import Example, Examples, Pair
from patchclamp.zoo._compile import tokenizer
from patchclamp.zoo.recipes._arithmetic import ASKS, END, NUMBERS, SUMS, VOCABULARY, A, Arithmetic, B, Pairs
from patchclamp.zoo.recipes._blind import Blind
from patchclamp.zoo.recipes._llama import last, share
from patchclamp.zoo.recipes._recipe import Finding, Goal
from patchclamp.zoo.recipes.backcopy import At

if TYPE_CHECKING:
    from patchclamp.models.model import Model

COUNT = 96
"""Pairs that indirect effects are taken on, at most."""
ANSWERED = Goal("share", least=0.8)
KEPT, LOST = Goal("accuracy", least=0.7), Goal("accuracy", most=0.3)
CARRIES, LITTLE = Goal("share", least=0.5), Goal("share", most=0.2)
IMPORTANT = Goal("share", least=0.4)
"""Relative importance of late MLPs at the last token for sums: about what the paper has."""
TIMES = Goal("ratio", least=2.0)
"""How many times as important they are for sums as for retrieval."""


@dataclass(frozen=True, eq=False)
class Flow:
    """Interventions on prompts that stand one by one for prompts with other operands; every number is a share of prompts."""

    model: "Model"
    pairs: Pairs

    @property
    def late(self) -> tuple[int, ...]:
        """The second half of the layers."""
        layers = len(self.model.anatomy.sizes)
        return tuple(range(layers // 2, layers))

    def moved(self, kind: str, layers: Sequence[int], places: Sequence[int]) -> float:
        """Share that say the other operands' result, with parts' outputs there put in from these; two forward passes."""
        values = self.model.record(self.pairs.there, [f"L{layer}.{kind}" for layer in layers])
        edits: Edits = {site: At(Put(value), _at(self.pairs.here, places)) for site, value in values.items()}
        return share(last(self.model, self.pairs.here, edits), self.pairs.other)

    def unseen(self, queries: Sequence[int], keys: Sequence[int], layers: Sequence[int] | None = None) -> float:
        """Share that stay right where these queries cannot look at these keys, in these layers (all); one forward pass."""
        where = _at(self.pairs.here, queries)[:, :, None] & _at(self.pairs.here, keys)[:, None]
        chosen = range(len(self.model.anatomy.sizes)) if layers is None else layers
        edits: Edits = {Site("scores", layer): Blind(where) for layer in chosen}
        return share(last(self.model, self.pairs.here, edits), self.pairs.said)

    def held(self, layers: Sequence[int], places: Sequence[int]) -> float:
        """Share that stay right with these layers' MLPs held at these places at their mean over prompts; two forward passes."""
        values = self.model.record(self.pairs.here, [f"L{layer}.mlp" for layer in layers])
        edits: Edits = {site: At(Put(value.mean(0)), _at(self.pairs.here, places)) for site, value in values.items()}
        return share(last(self.model, self.pairs.here, edits), self.pairs.said)


def _at(tokens: Int[Tensor, "row position"], places: Sequence[int]) -> Tensor:
    """[row, position]: whether a position is one of these places."""
    return torch.isin(torch.arange(tokens.shape[1]), torch.tensor(list(places))).expand(tokens.shape)


def indirect(model: "Model", data: Arithmetic, ask: int, count: int = COUNT) -> Mediated:
    """Indirect effects of other operands through each layer's attention and MLP at each place, for one question.

    Cost: two forward passes for each part and place.
    """
    pairs, items = Pairs.of(model, (ask,), data, count, step=-4), list[Example]()
    rows = zip(pairs.here.tolist(), pairs.there.tolist(), pairs.said.tolist(), pairs.other.tolist(), strict=True)
    for here, there, said, other in rows:
        pair = Pair(tuple(here), ((said,),), tuple(there), ((other,),))
        items.append(
            Example(tuple(here), ((said,),), pair, tuple(there), ((other,),), {"end": (END, END + 1)}, group=str(len(items)))
        )
    examples = Examples(tuple(items), tokenizer(VOCABULARY), f"operands of {ASKS[ask]}")
    return mediation(model, examples, ("L*.mlp", "L*.attn"), tuple(range(A, END + 1)), batch_size=len(items))


def importance(found: Mediated, layers: Sequence[int]) -> float:
    """Relative importance of these layers' MLPs at the last token among all MLPs at all places: RI of the paper's.

    RI = sum of log(IE + 1) over those MLPs / the same over all MLPs (`probes.mediation`)
    """

    def mlp(part: Part) -> bool:
        return isinstance(part, Site) and part.kind == "mlp"

    def late(part: Part) -> bool:
        return isinstance(part, Site) and mlp(part) and part.layer in layers and part.position == END

    every = found.importance(mlp)
    return found.importance(late) / every if every > 0 else 0.0


def importances(model: "Model", data: Arithmetic, layers: Sequence[int]) -> Mapping[str, float]:
    """RI of late MLPs at the last token, by what is asked."""
    return {name: importance(indirect(model, data, ask), layers) for ask, name in enumerate(ASKS)}


def found(model: "Model", data: Arithmetic) -> tuple[Finding, ...]:
    """The operands meet at the last token; late MLPs there make the result; retrieval does without them."""
    sums, numbers = (Flow(model, Pairs.of(model, asks, data)) for asks in (SUMS, NUMBERS))
    before, end, late = (A, A + 1, B), (END,), sums.late
    right = min(len(Pairs.of(model, (ask,), data, COUNT, step=-4).said) / COUNT for ask in range(len(ASKS)))
    answered = Finding("pairs never trained on, both said rightly: share, of the question with the fewest", right, ANSWERED)
    if not right:
        return (answered,)
    ri = importances(model, data, late)
    most, least = max(ri[ASKS[ask]] for ask in NUMBERS), min(ri[ASKS[ask]] for ask in SUMS)
    which = " and ".join(str(layer) for layer in late)
    return (
        answered,
        Finding("the operands do not meet before the last token: with the first out of the others' sight sums stay right",
                sums.unseen((A + 1, B), (A,)), KEPT),
        Finding("with the first out of the last token's sight they do not", sums.unseen(end, (A,)), LOST),
        Finding("with the second out of its sight they do not", sums.unseen(end, (B,)), LOST),
        Finding("they are there before the last layer: out of sight in it alone, sums stay right",
                sums.unseen(end, before, late[-1:]), KEPT),
        Finding(f"layers {which}'s MLPs at the last token make the result: from other operands' prompts, their result is said",
                sums.moved("mlp", late, end), CARRIES),
        Finding("the same MLPs at all other places do not", sums.moved("mlp", late, before), LITTLE),
        Finding("nor do they at the last token for a number that is only retrieved", numbers.moved("mlp", late, end), LITTLE),
        Finding("held at their mean, sums are lost", sums.held(late, end), LOST),
        Finding("and numbers are not", numbers.held(late, end), KEPT),
        Finding("their relative importance for sums, of + and - the smaller one", least, IMPORTANT),
        Finding("so many times that for retrieval, of first and second the larger one", least / most if most > 0 else float("inf"), TIMES),
    )  # fmt: skip
