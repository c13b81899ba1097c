"""Backward chaining, found again: which ancestors of the goal can be read where and from which layer on, and which edges it hangs on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from patchclamp.edits import Put
from patchclamp.errors import TrainingError
from patchclamp.models.editing import Edits
from patchclamp.sites import Site
from patchclamp.zoo.recipes._blind import Blind
from patchclamp.zoo.recipes._llama import last
from patchclamp.zoo.recipes._recipe import drawing
from patchclamp.zoo.recipes._trees import DEEPEST, NODE, NODES, Grown, Trees

if TYPE_CHECKING:
    from patchclamp.models.model import Model

ASKS = 2
"""The last tokens of a prompt, which say what is asked: the goal's word and the root."""
RIDGE = 1e-2
"""Of the probes, times the number of rows."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts of whole trees, with goals some way off.

    `chain` has the goal, its parent, ... by number; `k`-th edge up is that between the k-th ancestor and the one before it.
    """

    trees: Grown
    goal: Int[Tensor, " row"]

    @classmethod
    def of(cls, seed: int, step: int, count: int, least: int, most: int = DEEPEST) -> "Asked":
        """Prompts with goals so many edges away at least and at most, each distance as often as the other ones.

        Args:
            seed: of the data.
            step: a negative one: of trees that are never trained on.
            count: how many rows.
            least: edges.
            most: edges.

        Raises:
            TrainingError: among four times as many trees there are not enough with a node so far from the root.
        """
        data, kinds = Trees(seed), most - least + 1
        draw = drawing(f"{data.name}-asked-{least}-{most}", step)
        trees = data.trees(step, 4 * count, draw)
        far = least + torch.arange(4 * count) % kinds
        has = ((trees.depth == far[:, None]) & trees.there).any(1).nonzero()[:, 0]
        chosen = torch.cat([has[far[has] == one][: -(-count // kinds)] for one in range(least, most + 1)])
        if len(chosen) < count:
            raise TrainingError(
                f"{count} prompts with goals {least} to {most} edges away were asked for: {len(chosen)} were drawn"
            )
        kept = trees.at(chosen)
        return cls(kept, kept.goals(draw, far[chosen]))

    def at(self, rows: Int[Tensor, " chosen"]) -> "Asked":
        """Some of the rows."""
        return Asked(self.trees.at(rows), self.goal[rows])

    @property
    def tokens(self) -> Int[Tensor, "row position"]:
        """The prompts."""
        return self.trees.prompts(self.goal)

    @property
    def chain(self) -> Int[Tensor, "row back"]:
        """The goal and its ancestors, by number; from the root on it is the root."""
        return self.trees.above[torch.arange(len(self.goal)), self.goal]

    @property
    def far(self) -> Int[Tensor, " row"]:
        """Edges between root and goal."""
        return self.trees.depth[torch.arange(len(self.goal)), self.goal]

    @property
    def step(self) -> Int[Tensor, " row"]:
        """The token of the path's first step."""
        return self.word(self.chain.gather(1, self.far[:, None] - 1)[:, 0])

    def word(self, node: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The token that names a node."""
        return NODE + self.trees.names.gather(1, node[:, None])[:, 0]

    def edge(self, node: Int[Tensor, " row"]) -> Bool[Tensor, "row position"]:
        """Where the edge above a node stands; of the root nowhere."""
        at = self.trees.place.gather(1, node[:, None])
        return (torch.arange(NODES + ASKS)[None] == at) & (at > 0)

    def above_first(self, back: int) -> Bool[Tensor, " row"]:
        """Where edge `back` + 1 up from the goal is told before edge `back`, which can therefore look at it."""
        at = self.trees.place.gather(1, self.chain)
        return at[:, back] < at[:, back - 1]

    def elsewhere(self) -> "Asked":
        """The same trees, with a goal in the root's other branch: drawn evenly from all nodes there, whatever their distance."""
        draw = drawing("trees-elsewhere", len(self.goal))
        side = self.chain.gather(1, self.far[:, None] - 1)
        rows = torch.arange(len(self.goal))[:, None]
        above = self.trees.above
        while bool((self.trees.depth.gather(1, above[:, :, -1]) > 1).any()):  # trees can be deeper than goals are
            above = torch.cat([above, self.trees.parent[rows, above[:, :, -1]].clamp(min=0)[:, :, None]], 2)
        own = (above == side[:, :, None]).any(2)
        other = ~own & (torch.arange(NODES) > 0) & (self.trees.depth <= DEEPEST)
        return Asked(self.trees, torch.multinomial(other.double(), 1, generator=draw)[:, 0])

    def right(self, model: "Model", edits: Edits | None = None) -> Float[Tensor, " row"]:
        """1 where the first step is right; one forward pass."""
        return (last(model, self.tokens, edits).argmax(-1) == self.step).float()


# --- what can be read


def states(model: "Model", asked: Asked, places: Int[Tensor, " row"] | None = None) -> list[Float[Tensor, "row width"]]:
    """The residual stream behind the embedding and behind each layer, at one place of each prompt (None: the root); one forward pass."""
    sites = [Site("embed"), *(Site("resid.post", layer) for layer in range(model.layers))]
    values, rows = model.record(asked.tokens, sites), torch.arange(len(asked.goal))
    where = torch.full_like(rows, -1) if places is None else places
    return [values[site][rows, where].double() for site in sites]


def readable(
    fit: Float[Tensor, "row width"], test: Float[Tensor, "other width"], wanted: Int[Tensor, " row"], truth: Int[Tensor, " other"]
) -> float:
    """Accuracy of a linear probe: ridge regression on one-hot names, W = (X'X + n r I)^-1 X'Y, with a constant; rows it was not fitted to.

    Args:
        fit: states that it is fitted to.
        test: states that it is judged by.
        wanted: of each fitted row the name (below `NODES`).
        truth: of each judged row.
    """
    mean, scale = fit.mean(0), fit.std(0).clamp(min=1e-9)
    x, y = ((one - mean) / scale for one in (fit, test))
    x, y = (torch.cat([one, torch.ones_like(one[:, :1])], 1) for one in (x, y))
    weights = torch.linalg.solve(
        x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ one_hot(wanted, NODES).to(x)
    )
    return float(((y @ weights).argmax(1) == truth).double().mean())


def ancestors(
    fit: Sequence[Float[Tensor, "row width"]], wanted: Int[Tensor, "row back"],
    test: Sequence[Float[Tensor, "other width"]], truth: Int[Tensor, "other back"],
) -> Float[Tensor, "layer back"]:  # fmt: skip
    """How often probes name a node, by layer (0: the embedding).

    Args:
        fit: states that probes are fitted to, by layer (`states`).
        wanted: the names of the nodes that are asked for (`names`); a prompt with -1 is left out.
        test: states that they are judged by.
        truth: the names there.
    """
    found = torch.zeros(len(fit), wanted.shape[1])
    for back in range(wanted.shape[1]):
        here, there = wanted[:, back] >= 0, truth[:, back] >= 0
        for layer, (old, new) in enumerate(zip(fit, test, strict=True)):
            found[layer, back] = readable(old[here], new[there], wanted[here, back], truth[there, back])
    return found


def names(asked: Asked, chain: Int[Tensor, "row back"]) -> Int[Tensor, "row back"]:
    """Names of nodes; -1 of the root, which is the prompt's last word and needs no reading."""
    return torch.where(chain == 0, -1, asked.trees.names.gather(1, chain))


def looks(model: "Model", asked: Asked, position: int = -1) -> Float[Tensor, "layer back"]:
    """Mean attention of a position on the k-th edge up from the goal, by layer, summed over heads; k from 1."""
    patterns = model.record(asked.tokens, [f"L{layer}.pattern" for layer in range(model.layers)])
    where = torch.stack([asked.edge(asked.chain[:, back]) for back in range(DEEPEST)], 1).float()
    rows = []
    for layer in range(model.layers):
        pattern = patterns[Site("pattern", layer)][:, :, position].mean(1)
        rows.append(torch.einsum("rp,rkp->rk", pattern, where).mean(0))
    return torch.stack(rows)


# --- what it hangs on


def put_in(model: "Model", here: Asked, there: Asked, layer: int, position: int) -> float:
    """Share of prompts that make the first step of the other prompt, with its state behind a layer at one position; two passes. NaN
    where there are no prompts."""
    if not len(here.goal):
        return float("nan")
    site = Site("resid.post", layer, position=position)
    value = model.record(there.tokens, site.at(None))[site.at(None)][:, position]
    return float((last(model, here.tokens, {site: Put(value[:, None])}).argmax(-1) == there.step).float().mean())


def out_of_sight(model: "Model", where: Bool[Tensor, "row position"], layers: Sequence[int] | None = None) -> Edits:
    """Edits by which the goal's word and the root cannot look there, in these layers (None: in all)."""
    width = where.shape[1]
    asks = torch.arange(width) >= width - ASKS
    blind = Blind(asks[None, :, None] & where[:, None, :])
    return {Site("scores", layer): blind for layer in (range(model.layers) if layers is None else layers)}


def each_alone(model: "Model", count: int) -> Edits:
    """Edits by which edges do not see each other, in any layer: each sees itself and `<bos>` alone. For so many rows."""
    place = torch.arange(NODES + ASKS)
    edge = (place > 0) & (place < NODES)
    blind = Blind((edge[:, None] & edge[None] & (place[:, None] != place[None])).expand(count, -1, -1))
    return {Site("scores", layer): blind for layer in range(model.layers)}


def kept(model: "Model", asked: Asked, edits: Edits) -> float:
    """Share of right first steps; one forward pass."""
    return float(asked.right(model, edits).mean())
