"""Trees of named nodes, told edge by edge; rows that ask for the path from the root down to a goal, or for the way up from it.

A row is `<bos>`, the edges in random order, a word each (`n2>n7`), then the goal as a word of its own (`to-n3`), the root,
and the path from the root to the goal. A row that climbs has `up` and the goal in place of goal and root, and then the way up. The root
has two branches, always, so that the first step of a path is one of two, and only who sees where the goal hangs knows which.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import one_hot

from patchclamp.errors import TrainingError
from patchclamp.training import Rows
from patchclamp.zoo.recipes._llama import BOS, PAD
from patchclamp.zoo.recipes._recipe import SPECIAL, drawing

NODES, DEEPEST, SMALLEST = 10, 5, 4
"""Nodes of a whole tree; edges between root and goal, at most; nodes of the trees that training begins with."""
HELD = 8
"""One tree in so many is never trained on."""
LEAVES = 0.75
"""Share of nodes that hang on a leaf when a tree is grown; all others make a fork."""
NODE = len(SPECIAL)
GOAL = NODE + NODES
UP = GOAL + NODES
EDGE = UP + 1
PAIRS = tuple((parent, child) for parent in range(NODES) for child in range(NODES) if parent != child)
VOCABULARY = (
    *SPECIAL, *(f"n{node}" for node in range(NODES)), *(f"to-n{node}" for node in range(NODES)), "up",
    *(f"n{parent}>n{child}" for parent, child in PAIRS),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Grown:
    """Trees, a row each; nodes by the order in which they grew (0: the root), and what they are called.

    Args:
        parent: of each node; of the root -1.
        depth: edges between it and the root.
        names: of each node.
        size: how many of the nodes there are: the first ones, which are a tree, too.
        told: the order of edges, each by its lower node; those that there are not stand last.
    """

    parent: Int[Tensor, "row node"]
    depth: Int[Tensor, "row node"]
    names: Int[Tensor, "row node"]
    size: Int[Tensor, " row"]
    told: Int[Tensor, "row edge"]

    @property
    def there(self) -> Bool[Tensor, "row node"]:
        """Which nodes there are."""
        return torch.arange(self.parent.shape[1])[None] < self.size[:, None]

    @property
    def above(self) -> Int[Tensor, "row node back"]:
        """Each node, its parent, grandparent, ... (by number; the root's are the root), up to `DEEPEST` edges."""
        chain = [torch.arange(self.parent.shape[1]).expand_as(self.parent)]
        for _ in range(DEEPEST):
            chain.append(self.parent.gather(1, chain[-1]).clamp(min=0))
        return torch.stack(chain, 2)

    @property
    def place(self) -> Int[Tensor, "row node"]:
        """Where in the row the edge above each node stands; of the root 0, which is `<bos>`."""
        at = torch.arange(1, self.parent.shape[1])[None].expand_as(self.told)
        return torch.zeros_like(self.parent).scatter(1, self.told, at)

    def at(self, rows: Tensor) -> "Grown":
        """Some of the rows."""
        return Grown(self.parent[rows], self.depth[rows], self.names[rows], self.size[rows], self.told[rows])

    def goals(self, draw: torch.Generator, far: Int[Tensor, " row"] | None = None) -> Int[Tensor, " row"]:
        """A goal for each row: first how far it is, evenly from the distances that there are up to `DEEPEST`, then which node.

        Args:
            draw: of what is drawn.
            far: the distance, where it is given; a row in which no node is so far is an error of torch's.
        """
        depth = torch.where(self.there, self.depth, 0)
        if far is None:
            some = one_hot(depth, self.parent.shape[1]).sum(1) > 0
            some[:, 0], some[:, DEEPEST + 1 :] = False, False
            far = torch.multinomial(some.double(), 1, generator=draw)[:, 0]
        return torch.multinomial((depth == far[:, None]).double(), 1, generator=draw)[:, 0]

    def path(self, goal: Int[Tensor, " row"]) -> tuple[Int[Tensor, "row step"], Int[Tensor, " row"]]:
        """Names of the goal, its parent, ... (up to `DEEPEST` edges), and how far the root is."""
        rows = torch.arange(len(goal))
        chain = self.above[rows, goal]
        return self.names.gather(1, chain), self.depth[rows, goal]

    def prompts(self, goal: Int[Tensor, " row"]) -> Int[Tensor, "row position"]:
        """`<bos>`, edges, goal, root: all trees of one size."""
        count = len(goal)
        name = self.names.gather(1, goal[:, None])
        return torch.cat([torch.full((count, 1), BOS), self.edges, GOAL + name, NODE + self.names[:, :1]], 1)

    @property
    def edges(self) -> Int[Tensor, "row edge"]:
        """The edges' words, as they are told."""
        parent, child = self.names.gather(1, self.parent.gather(1, self.told).clamp(min=0)), self.names.gather(1, self.told)
        return EDGE + parent * (NODES - 1) + child - (child > parent).long()

    def rows(self, goal: Int[Tensor, " row"], climbs: Bool[Tensor, " row"]) -> Rows:
        """Whole rows; weight is on the path, or on the way up where a row climbs. Labels: `far`, `size`, `climbs`."""
        names, far = self.path(goal)
        ends, steps = self.size - 1, torch.arange(DEEPEST)[None]
        down = names.gather(1, (far[:, None] - 1 - steps).clamp(min=0))
        asked = torch.where(climbs[:, None], names[:, 1:], down)
        word = torch.where(climbs, UP, GOAL + names[:, 0])
        start = torch.where(climbs, names[:, 0], self.names[:, 0])
        tail = torch.cat([word[:, None], NODE + start[:, None], torch.where(steps < far[:, None], NODE + asked, PAD)], 1)
        body = torch.cat([torch.full((len(goal), 1), BOS), self.edges, torch.full_like(tail, PAD)], 1)
        places = torch.arange(body.shape[1])[None]
        body = torch.where(places > ends[:, None], PAD, body)
        tokens = body.scatter(1, 1 + ends[:, None] + torch.arange(tail.shape[1])[None], tail)
        weights = ((places > ends[:, None] + 2) & (tokens != PAD)).float()
        width = int((tokens != PAD).sum(1).max())
        tokens, weights = tokens[:, :width], weights[:, :width]
        return Rows(tokens, weights, tokens != PAD, {"far": far, "size": self.size, "climbs": climbs.long()})


@dataclass(frozen=True)
class Trees:
    """Rows of random trees; those of negative steps are whole trees of another eighth of all, which are never trained on.

    Over the first `growing` updates trees grow from `SMALLEST` to `NODES` nodes (each row has up to four fewer than the largest), and
    the share of rows that climb falls from `climbing` to 0: one step up is learned before many.
    """

    seed: int = 0
    growing: int = 1000
    climbing: float = 0.5

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"trees-{NODES}-{DEEPEST}-{SMALLEST}-{HELD}-{LEAVES}-{self.growing}-{self.climbing}-seed-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update."""
        draw = drawing(self.name, step)
        trees = self.trees(step, count, draw)
        share = 0.0 if step < 0 else self.climbing * max(0.0, 1 - step / self.growing)
        return trees.rows(trees.goals(draw), torch.rand(count, generator=draw) < share)

    def trees(self, step: int, count: int, draw: torch.Generator) -> Grown:
        """So many trees: of negative steps held-out ones, of all other steps others."""
        many = 2 * count + 64 if step >= 0 else 2 * HELD * count + 256
        top = NODES if step < 0 else min(NODES, SMALLEST + int((NODES - SMALLEST) * step / self.growing))
        low = NODES if step < 0 else max(SMALLEST, top - 4)
        parent, depth = grown(many, draw)
        names = torch.rand(many, NODES, generator=draw).argsort(1)
        size = torch.randint(low, top + 1, (many,), generator=draw)
        late = torch.arange(1, NODES)[None] >= size[:, None]
        told = torch.where(late, 2.0, torch.rand(many, NODES - 1, generator=draw)).argsort(1) + 1
        chosen = (held(parent, names) == (step < 0)).nonzero()[:count, 0]
        if len(chosen) < count:
            raise TrainingError(
                f"{count} trees were asked for step {step}, and only {len(chosen)} of {many} can be: ask for more at once"
            )
        return Grown(parent, depth, names, size, told).at(chosen)


def grown(count: int, draw: torch.Generator) -> tuple[Int[Tensor, "row node"], Int[Tensor, "row node"]]:
    """Parents and depths of random trees in which no node has more than two children: the first two nodes hang on the root, each further
    one on a leaf in three cases of four, and else (where that can be) on a node with one child."""
    parent, depth = torch.full((count, NODES), -1), torch.zeros(count, NODES, dtype=torch.long)
    children = torch.zeros(count, NODES, dtype=torch.long)
    for new in range(1, NODES):
        leaf, single = children[:, :new] == 0, children[:, :new] == 1
        longer = (torch.rand(count, generator=draw) < LEAVES) | ~single.any(1)
        where = torch.where(longer[:, None], leaf, single)
        if new < 3:
            where = torch.arange(new)[None].expand(count, new) == 0
        on = torch.multinomial(where.double(), 1, generator=draw)
        parent[:, new], depth[:, new] = on[:, 0], depth.gather(1, on)[:, 0] + 1
        children.scatter_add_(1, on, torch.ones_like(on))
    return parent, depth


def held(parent: Int[Tensor, "row node"], names: Int[Tensor, "row node"]) -> Bool[Tensor, " row"]:
    """Which trees are kept back: by a number that hangs on who is whose parent, by name, and on nothing else (not on the edges' order).

    Of a tree of fewer nodes the whole tree decides that it was cut from, which no whole tree in training was held out for.
    """
    above = torch.where(parent < 0, -1, names.gather(1, parent.clamp(min=0)))
    named = torch.zeros_like(names).scatter(1, names, above)
    number = torch.zeros(len(names), dtype=torch.long)
    for one in named.unbind(1):
        number = (31 * number + one + 7) % 1_000_003
    return number % HELD == 0
