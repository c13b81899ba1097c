"""Paths in trees: the data by loops of the tests' own, the analysis on a backward chainer wired by hand, on one with a broken chain, and on
random weights."""

from collections import Counter

import pytest
import torch

from patchclamp.models.model import Model
from patchclamp.models.normless import NormlessConfig, NormlessForCausalLM
from patchclamp.zoo.recipes import _trees, _trees_chain, recipe, trees
from patchclamp.zoo.recipes._llama import last
from patchclamp.zoo.recipes._trees import DEEPEST, EDGE, GOAL, NODE, NODES, PAIRS, SMALLEST, VOCABULARY, Trees
from patchclamp.zoo.recipes._trees_chain import Asked, each_alone, looks, out_of_sight


def read(row: list[int]) -> tuple[dict[str, str], list[str]]:
    """Of a row's words: who is whose parent, and what follows the edges."""
    words = [VOCABULARY[token] for token in row if token]
    assert words[0] == "<bos>"
    edges = [word.split(">") for word in words if ">" in word[1:] and word != "<bos>"]
    assert words[1 : 1 + len(edges)] == [">".join(edge) for edge in edges]
    assert len({child for _, child in edges}) == len(edges)
    return {child: parent for parent, child in edges}, words[1 + len(edges) :]


def upwards(parents: dict[str, str], node: str) -> list[str]:
    """The node, its parent, ... up to the root."""
    way = [node]
    while way[-1] in parents:
        way.append(parents[way[-1]])
        assert len(way) <= NODES
    return way


# --- rows


@pytest.mark.parametrize("step", [0, 500, 2000, -1])
def test_rows_tell_a_tree_and_a_path_in_it(step: int) -> None:
    """Read back from words: one root with two branches, at most two children each, the path or the way up; sizes and shares as said."""
    data = Trees()
    rows = data.rows(step, 400)
    sizes, climbs, far = Counter[int](), 0, Counter[int]()
    for row, weights in zip(rows.tokens.tolist(), rows.weights.tolist(), strict=True):
        parents, rest = read(row)
        (root,) = {upwards(parents, node)[-1] for node in parents}
        children = Counter(parents.values())
        assert children[root] == 2 and max(children.values()) == 2
        sizes[len(parents) + 1] += 1
        goal = rest[1] if rest[0] == "up" else rest[0].removeprefix("to-")
        way = upwards(parents, goal)
        assert rest[2:] == (way[1:] if rest[0] == "up" else way[-2::-1]) and (rest[0] == "up" or rest[1] == root)
        climbs += rest[0] == "up"
        far[len(way) - 1] += 1
        start = 1 + len(parents) + 2
        assert [place for place, weight in enumerate(weights) if weight] == list(range(start, start + len(way) - 1))
    top = NODES if step < 0 else min(NODES, SMALLEST + 6 * step // data.growing)
    assert set(sizes) == (set(range(max(SMALLEST, top - 4), top + 1)) if step >= 0 else {NODES})
    share = 0.5 * max(0.0, 1 - step / data.growing) if step >= 0 else 0.0
    assert climbs / 400 == pytest.approx(share, abs=0.1)  # 4 standard errors
    assert set(far) <= set(range(1, DEEPEST + 1)) and (step >= 0 or min(far.values()) > 20)


def test_no_tree_is_on_both_sides() -> None:
    """Trees of ten nodes as sets of edges; and the verdict is the tree's own: the same when its nodes are numbered in another order."""
    data = Trees()
    sides = [
        {frozenset(read(row)[0].items()) for row, size in zip(rows.tokens.tolist(), rows.labels["size"].tolist(), strict=True) if size == NODES}
        for rows in (data.rows(5000, 2000), data.rows(-1, 2000))
    ]  # fmt: skip
    assert not sides[0] & sides[1] and all(len(side) > 300 for side in sides)
    draw = torch.Generator().manual_seed(0)
    parent, _ = _trees.grown(300, draw)
    names = torch.rand(300, NODES, generator=draw).argsort(1)
    order = torch.rand(300, NODES, generator=draw).argsort(1)  # new number -> old number
    old = parent.gather(1, order)
    new = torch.where(old < 0, -1, order.argsort(1).gather(1, old.clamp(min=0)))
    verdict = _trees.held(parent, names)
    assert torch.equal(_trees.held(new, names.gather(1, order)), verdict)
    assert float(verdict.float().mean()) == pytest.approx(1 / 8, abs=0.08)


def test_what_is_asked_is_as_far_as_it_should_be() -> None:
    """Chains, edges and goals elsewhere, against the words of the prompts."""
    asked = Asked.of(0, -2, 120, least=2, most=4)
    off = asked.elsewhere()
    assert Counter(asked.far.tolist()) == {2: 40, 3: 40, 4: 40}
    trained = {frozenset(read(row)[0].items()) for row in Trees().rows(3000, 500).tokens.tolist()}
    for number, row in enumerate(asked.tokens.tolist()):
        parents, rest = read(row)
        way = upwards(parents, rest[0].removeprefix("to-"))
        assert frozenset(parents.items()) not in trained and rest[1] == way[-1] and len(rest) == 2
        called = [f"n{asked.trees.names[number, node]}" for node in asked.chain[number].tolist()]
        assert called[: len(way)] == way and set(called[len(way) :]) <= {way[-1]}
        assert VOCABULARY[asked.step[number]] == way[-2]
        for back in range(3):
            seen = asked.edge(asked.chain[:, back])[number].nonzero()[:, 0].tolist()
            words = [VOCABULARY[row[place]] for place in seen]
            assert words == ([f"{way[back + 1]}>{way[back]}"] if back + 1 < len(way) else [])
        assert row[:-2] == off.tokens[number].tolist()[:-2]
        other = upwards(parents, VOCABULARY[off.tokens[number, -2]].removeprefix("to-"))
        assert other[-2] != way[-2] and len(other) <= DEEPEST + 1


# --- the analysis


SHARP = 30.0


def wired(broken: bool = False) -> Model:
    """A backward chainer without norms, MLPs or positions, one head a layer; `broken`: layers 2 to 4 begin anew from the goal.

    The stream: of an edge its child (10) and its parent (10); of the last word its name (10); the goal and its ancestors by layer (5 x 10);
    the answer (10); what marks goal words and `<bos>`, where a head rests that finds nothing.
    """
    child, parent, own, chain, answer, goal, rest = 0, 10, 20, 30, 80, 90, 91
    config = NormlessConfig(
        vocab_size=len(VOCABULARY), hidden_size=92, intermediate_size=4, num_hidden_layers=6, num_attention_heads=1, head_dim=32,
        causal=True, max_position_embeddings=32,
    )  # fmt: skip
    hf = NormlessForCausalLM(config).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.zero_()
        words, names = hf.model.embed_tokens.weight, torch.arange(NODES)
        words[1, rest] = 1
        words[NODE + names, own + names] = 1
        words[GOAL + names, child + names] = 1
        words[GOAL : GOAL + NODES, goal] = 1
        for number, (above, below) in enumerate(PAIRS):
            words[EDGE + number, child + below] = words[EDGE + number, parent + above] = 1
        for layer, block in enumerate(hf.model.layers):
            q, k, v, o = (getattr(block.self_attn, f"{name}_proj") for name in "qkvo")
            for name in range(NODES):
                if layer == 0:  # what the goal is
                    v.weight[name, child + name], o.weight[chain + name, name] = 1, 1
                elif layer < 5:  # the edge into what was found last: its parent
                    source = 0 if broken else layer - 1
                    q.weight[name, chain + 10 * source + name], k.weight[name, child + name] = SHARP, 1
                    v.weight[name, parent + name], o.weight[chain + 10 * layer + name, name] = 1, 1
                else:  # the edge out of the root whose child was found at any time
                    q.weight[name, own + name], k.weight[name, parent + name] = SHARP, 1
                    for back in range(5):
                        q.weight[10 + name, chain + 10 * back + name] = SHARP
                    k.weight[10 + name, child + name] = 1
                    v.weight[name, child + name], o.weight[answer + name, name] = 1, 1
            q.bias[30], k.weight[30, goal if layer == 0 else rest] = SHARP, (1 if layer == 0 else 0.5)
            if layer > 0:
                k.weight[30, goal] = -4  # the goal's word has a child's place, and is no edge
        for name in range(NODES):
            hf.lm_head.weight[NODE + name, answer + name] = 1
    return Model.load(hf)


def by_claim(model: Model) -> dict[str, tuple[float, bool]]:
    """What was found, by the beginning of its claim."""
    return {finding.claim.partition("(")[0].strip(): (finding.number, finding.holds) for finding in trees.found(model, 0)}


def test_a_wired_backward_chainer_is_found() -> None:
    """All claims hold but those of parts of paths at other edges: its edges look at nothing, so that nothing is lost when they cannot."""
    model = wired()
    for least in range(1, DEEPEST + 1):
        assert float(Asked.of(0, -2, 64, least=least, most=least).right(model).mean()) == 1
    claims = by_claim(model)
    assert {claim for claim, (_, holds) in claims.items() if not holds} == {
        "edges do not see each other, goals 4 and 5 away", "the same, goals 5 away",
        "a probe at the goal's edge names its grandparent, told before it, best layer",
        "edge 2 or 3 out of sight, goals 4 away, told before the edge below it",
    }  # fmt: skip
    assert claims["edges do not see each other, goals 4 and 5 away"][0] == claims["the same, goals 5 away"][0] == 1
    assert claims["ancestor 3 comes later than ancestor 1"][0] == claims["edge 3 is needed later than edge 1"][0] == 2


def test_the_wired_chainer_looks_at_an_edge_a_layer() -> None:
    """Layers 1 to 4 of the root at edges 1 to 4 up from a goal five edges away, the last layer at the edge out of the root: by design."""
    seen = looks(wired(), Asked.of(0, -2, 32, least=5))
    wanted = torch.zeros(6, DEEPEST)
    wanted[torch.arange(1, 6), torch.arange(5)] = 1
    torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=0)


@pytest.mark.long
def test_a_broken_chain_is_not_found() -> None:
    """Where every layer begins anew from the goal, goals up to two edges away are right; of farther ones the parent is said."""
    model = wired(broken=True)
    assert float(Asked.of(0, -2, 64, least=1, most=2).right(model).mean()) == 1
    assert float(Asked.of(0, -2, 64, least=3).right(model).mean()) == 0
    claims = by_claim(model)
    lost = {claim for claim, (_, holds) in claims.items() if not holds}
    assert {f"a probe at the root's position names ancestor {back}, best layer" for back in (2, 3)} <= lost
    assert {f"an edge of the other branch out of sight, goals farther than {back}" for back in (1, 2, 3)} <= lost
    assert (
        claims["a probe at the root's position names ancestor 1, best layer"][1] and "edge 3 is needed later than edge 1" in lost
    )


@pytest.mark.long
def test_random_weights_find_nothing() -> None:
    claims = by_claim(Model.load(recipe("trees").build(1)))
    named = ("a probe at", "ancestor 3", "with another goal's state at the root", "an edge of the other branch")
    assert not any(holds for claim, (_, holds) in claims.items() if claim.startswith(named))


def test_probes_read_what_is_there_and_nothing_else() -> None:
    """Names written into random directions, on top of noise, are read on new rows; noise alone is at chance (.1, 4 standard errors)."""
    draw = torch.Generator().manual_seed(0)
    code = torch.randn(NODES, 32, generator=draw, dtype=torch.float64)
    wanted, truth = (torch.randint(0, NODES, (count,), generator=draw) for count in (800, 600))
    noise = [torch.randn(count, 32, generator=draw, dtype=torch.float64) for count in (800, 600)]
    assert _trees_chain.readable(code[wanted] + 0.3 * noise[0], code[truth] + 0.3 * noise[1], wanted, truth) > 0.97
    assert _trees_chain.readable(noise[0], noise[1], wanted, truth) < 0.15


def test_knock_outs_are_masks_of_the_models_own() -> None:
    """Logits to 1e-4 (float32), against transformers' own four-axis mask on random weights, built by loops; and what is closed counts."""
    hf = recipe("trees").build(2)
    model, asked = Model.load(hf), Asked.of(0, -2, 24, least=3)
    count, width = asked.tokens.shape
    hidden, alone = (torch.ones(width, width).tril().bool().repeat(count, 1, 1) for _ in range(2))
    where = asked.edge(asked.chain[:, 1])
    for row in range(count):
        for query in range(width):
            for key in range(query + 1):
                hidden[row, query, key] = not (query >= width - 2 and where[row, key])
                alone[row, query, key] = not (query < NODES and 0 < key < query)
    plain = last(model, asked.tokens)
    for seen, edits in ((hidden, out_of_sight(model, where)), (alone, each_alone(model, count))):
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
        with torch.no_grad():
            wanted = hf(input_ids=asked.tokens, attention_mask=mask).logits[:, -1]
        torch.testing.assert_close(last(model, asked.tokens, edits), wanted, atol=1e-4, rtol=1e-4)
        assert float((wanted - plain).abs().max()) > 1e-2
