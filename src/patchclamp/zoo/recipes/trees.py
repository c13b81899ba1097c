"""zoo/trees (Z10): paths in trees; which way to go from the root is known to who works backwards from the goal.

Rows are trees told edge by edge in random order, a goal and the root, and the path from the root to the goal (`_trees`). The root has two
branches: for the first step one must know which of them the goal is in, and for a goal k edges away that takes k - 1 steps up.
"""

from typing import TYPE_CHECKING, Any

import torch

from patchclamp.training import Training
from patchclamp.zoo.recipes._llama import llama
from patchclamp.zoo.recipes._look import judged
from patchclamp.zoo.recipes._recipe import Finding, Goal, Recipe, drawing
from patchclamp.zoo.recipes._trees import DEEPEST, EDGE, GOAL, NODE, NODES, PAIRS, VOCABULARY, Trees
from patchclamp.zoo.recipes._trees_chain import Asked, ancestors, each_alone, kept, names, out_of_sight, put_in, states

if TYPE_CHECKING:
    from patchclamp.models.model import Model

LAYERS, SPREAD, ADDED = 6, 0.5, 0.2
"""Layers; deviation of the first embedding; first weights of what attention and MLPs add, so many times those of `llama`."""


def build(seed: int = 0) -> Any:
    """6 layers of one head, width 64, MLPs of 128 neurons. The words of an edge and of a goal begin as sums that hold their lower node's.

    What layers add is small at first, so that six of them do not drown the embedding. Neither choice was tested without the other.
    """
    hf = llama(len(VOCABULARY), seed, LAYERS, heads=1)
    draw = drawing("trees-build", seed)
    with torch.no_grad():
        words = hf.model.embed_tokens.weight
        words.mul_(SPREAD / hf.config.initializer_range)
        parents = SPREAD * torch.randn(NODES, words.shape[1], generator=draw)
        ends = torch.tensor(PAIRS)
        words[EDGE:] = (parents[ends[:, 0]] + words[NODE + ends[:, 1]]) / 2**0.5
        words[GOAL : GOAL + NODES] = (words[GOAL : GOAL + NODES] + words[NODE : NODE + NODES]) / 2**0.5
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.mul_(ADDED)
            layer.mlp.down_proj.weight.mul_(ADDED)
    return hf


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """On trees that were never trained on: `accuracy` of whole paths, said from the right ones before; of the first step by how far the
    goal is (`first.1` to `first.5`; chance of who knows the root's branches is .5), and of goals 4 and 5 edges away (`deep`)."""
    rows = Trees(seed).rows(-1, 512)
    assert rows.labels is not None
    logits, asked = model.run(rows.tokens), rows.weights > 0
    right = (logits[:, :-1].argmax(-1) == rows.tokens[:, 1:]) | ~asked[:, 1:]
    far, first = rows.labels["far"], right.gather(1, asked[:, 1:].long().argmax(1, keepdim=True))[:, 0].float()
    by = {f"first.{one}": float(first[far == one].mean()) for one in range(1, DEEPEST + 1)}
    loss = judged(logits, rows.tokens, asked)["test_loss"]
    return {"accuracy": float(right.all(1).float().mean()), "deep": float(first[far >= 4].mean()), "test_loss": loss} | by


# --- how


ENOUGH = 0.8
READ, CHANCE = Goal("accuracy", least=ENOUGH), Goal("accuracy", most=0.25)
"""What a probe names, and what it does not: ten names, and shuffled labels."""
LOST, KEPT = Goal("accuracy", most=0.65), Goal("accuracy", least=0.85)
"""First steps without what they hang on (chance for who knows the root's branches: .5), and without what they do not."""
FOLLOWS, STAYS = Goal("share", least=0.8), Goal("share", most=0.2)
LATER = Goal("layers", least=1.0)


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """What can be read at the root, layer by layer; where the goal is carried; which edges the first step hangs on,
    and which parts of paths other edges hold."""
    return (*_read(model, seed), *_carried(model, seed), *_closed(model, seed), *_aside(model, seed))


def _read(model: "Model", seed: int) -> tuple[Finding, ...]:
    """Ancestors of goals 4 and 5 edges away at the root's position; later by 0 layers where one of them never comes."""
    fit, test = Asked.of(seed, -3, 1024, least=4), Asked.of(seed, -4, 512, least=4)
    (mine, theirs), (seen, new) = (
        [names(one, one.chain[:, 1:4]) for one in (fit, test)],
        [states(model, one) for one in (fit, test)],
    )
    own, shuffled = (ancestors(seen, wanted, new, theirs) for wanted in (mine, mine.roll(1, 0)))
    off = [names(one, one.elsewhere().chain[:, 1:2]) for one in (fit, test)]
    other = ancestors(seen, off[0], new, off[1])
    comes = [[layer for layer, row in enumerate(own.tolist()) if row[back] >= ENOUGH] for back in range(3)]
    later = comes[2][0] - comes[0][0] if comes[0] and comes[2] else 0
    told = "; ".join(" ".join(f"{value:.2f}" for value in row) for row in own.T.tolist())
    return (
        *(Finding(f"a probe at the root's position names ancestor {back + 1}, best layer", float(own[:, back].max()), READ) for back in range(3)),
        Finding(f"ancestor 3 comes later than ancestor 1 (by layer: {told})", float(later), LATER),
        Finding("names of another prompt's ancestors, best layer", float(shuffled.max()), CHANCE),
        Finding("the parent of a node of the other branch, best layer", float(other.max()), Goal("accuracy", most=0.5)),
    )  # fmt: skip


def _carried(model: "Model", seed: int) -> tuple[Finding, ...]:
    """Which goal it is: states of a prompt whose goal is in the root's other branch, put in at the goal's word or at the root."""
    here = Asked.of(seed, -5, 512, least=2)
    there = here.elsewhere()
    both = ((here.right(model) > 0) & (there.right(model) > 0)).nonzero()[:, 0]
    shares = {at: [put_in(model, here.at(both), there.at(both), layer, at) for layer in range(LAYERS)] for at in (-2, -1)}
    told = {at: " ".join(f"{value:.2f}" for value in row) for at, row in shares.items()}
    late = LAYERS - 2
    return (
        Finding(f"with another goal's state at the goal's word, that goal's step ({told[-2]}): behind layer {late}", shares[-2][late], STAYS),
        Finding(f"with another goal's state at the root ({told[-1]}): behind layer {late}", shares[-1][late], FOLLOWS),
    )  # fmt: skip


def _closed(model: "Model", seed: int) -> tuple[Finding, ...]:
    """Edges out of sight of the goal's word and the root, in all layers and in one."""
    claims, costs = list[Finding](), dict[int, list[float]]()
    for back in (1, 2, 3):
        asked = Asked.of(seed, -6, 512, least=back + 1)
        other = asked.elsewhere().goal
        own, off = (kept(model, asked, out_of_sight(model, asked.edge(node))) for node in (asked.chain[:, back - 1], other))
        claims += [
            Finding(f"edge {back} up from the goal out of sight, goals farther than {back}", own, LOST),
            Finding(f"an edge of the other branch out of sight, goals farther than {back}", off, KEPT),
        ]
        far = Asked.of(seed, -7, 512, least=4)
        where = far.edge(far.chain[:, back - 1])
        costs[back] = [kept(model, far, out_of_sight(model, where, [layer])) for layer in range(LAYERS)]
    worst = {back: min(range(LAYERS), key=left.__getitem__) for back, left in costs.items()}
    told = "; ".join(" ".join(f"{value:.2f}" for value in left) for left in costs.values())
    return (
        *claims,
        Finding(f"edge 3 is needed later than edge 1 (out of sight in one layer: {told})", float(worst[3] - worst[1]), LATER),
    )


def _aside(model: "Model", seed: int) -> tuple[Finding, ...]:
    """Parts of paths at other edges: what can be read there, what is left without, and what they make up for.

    An edge can know the one above it only where that is told before it: prompts where it is told behind it are the control.
    """
    fit, test = (Asked.of(seed, step, count, least=3) for step, count in ((-9, 1536), (-10, 1024)))
    at = [states(model, one, one.trees.place.gather(1, one.goal[:, None])[:, 0]) for one in (fit, test)]
    wanted = [names(one, one.chain[:, 2:3]) for one in (fit, test)]
    first = [one.above_first(1) for one in (fit, test)]

    def best(before: bool) -> float:
        """Best layer's accuracy of the goal's grandparent at the goal's own edge."""
        old, new = (told == before for told in first)
        return float(ancestors([one[old] for one in at[0]], wanted[0][old], [one[new] for one in at[1]], wanted[1][new]).max())

    alone = list[float]()
    for least, most in ((1, 2), (3, 4), (5, 5), (4, 5)):
        asked = Asked.of(seed, -8, 512, least, most)
        alone.append(kept(model, asked, each_alone(model, len(asked.goal))))
    four, left = Asked.of(seed, -11, 1024, least=4, most=4), list[tuple[float, float]]()
    for back in (1, 2):
        right = four.right(model, out_of_sight(model, four.edge(four.chain[:, back])))
        known = four.above_first(back)
        left.append((float(right[known].mean()), float(right[~known].mean())))
    before, behind = (sum(one) / len(left) for one in zip(*left, strict=True))
    return (
        Finding("edges do not see each other, goals 4 and 5 away", alone[3], Goal("accuracy", most=0.7)),
        Finding("edges do not see each other, goals 1 and 2 away", alone[0], KEPT),
        Finding("the same, goals 5 away", alone[2], LOST),
        Finding("the same, goals 3 and 4 away", alone[1], KEPT),
        Finding("a probe at the goal's edge names its grandparent, told before it, best layer", best(True), READ),
        Finding("a probe there names it, told behind it, best layer", best(False), CHANCE),
        Finding("edge 2 or 3 out of sight, goals 4 away, told before the edge below it", before, KEPT),
        Finding("edge 2 or 3 out of sight, goals 4 away, told behind it", behind, LOST),
    )


RECIPES = (
    Recipe(
        name="trees",
        row="Z10",
        about="6 layers of one head (Llama, width 64) on trees of ten nodes told edge by edge, a goal and the root: the path is asked",
        known="from the goal backwards, a layer an edge, at the root's position; parts of paths are put together at other edges meanwhile",
        paper="Brinkmann et al. 2024, A Mechanistic Analysis of a Transformer Trained on a Symbolic Multi-Step Reasoning Task, "
        "https://arxiv.org/abs/2402.11917",
        minutes=12.0,
        goals=(Goal("accuracy", least=0.95), Goal("deep", least=0.9)),
        build=build,
        data=Trees,
        training=Training(
            2700,
            batch=64,
            rate=3e-3,
            schedule="wsd",
            cooldown=900,
            warmup=100,
            betas=(0.9, 0.98),
            decay=0.01,
            evaluate=200,
            checkpoints=8,
            states="last",
        ),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
    ),
)
