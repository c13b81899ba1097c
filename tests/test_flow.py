"""Information flow routes: shares against loops written out here, routes against a search of the test's own, planted heads."""

import pytest
import torch

from cases import tiny
from patchclamp.discover.flow import RELATIONS, flow, flow_heads, token_class
from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.zoo import wired
from test_parts import examples

TOKENS = torch.tensor([[5, 11, 23, 42, 7, 31]])


class Ids:
    """A tokenizer for ids written as they are."""

    bos_token_id = None

    def decode(self, token_ids: list[int], /) -> str:
        return " ".join(map(str, token_ids))


def near(part: torch.Tensor, state: torch.Tensor) -> float:
    return max(0.0, float(state.abs().sum() - (state - part).abs().sum()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi", "granite"])
def test_shares_are_those_of_a_loop_and_contributions_add_up(name: str):
    """Pre-norm, grouped-query, post-norm, parallel, scaled residual. float32: sums of some 30 numbers, so 1e-5."""
    model = Model.load(tiny(name), tokenizer=Ids())
    found = flow(model, TOKENS)
    parallel = model.anatomy.parallel
    sites = ["L*.resid.pre", "L*.resid.post", "L*.pattern", "L*.v", "L*.z", "L*.attn.write", "L*.mlp.write", "L*.h*.write"]
    kept = model.record(TOKENS, [*sites, *([] if parallel else ["L*.resid.mid"])])
    for layer in range(model.layers):
        sizes = model.anatomy.sizes[layer]
        pattern, values, z = (kept[Site(kind, layer)][0] for kind in ("pattern", "v", "z"))
        write = torch.stack([kept[Site("write", layer, head)][0].detach() for head in range(sizes.heads)], 1)
        before, after = kept[Site("resid.pre", layer)][0], kept[Site("resid.post", layer)][0]
        state = after if parallel else kept[Site("resid.mid", layer)][0]
        wrote = kept[Site("mlp.write", layer)][0]
        for target in (2, 5):
            # a head's write is linear in z: a source's part of z is brought through the same map, found here from what it did to z
            brought = {}
            for head in range(sizes.heads):
                kv = head // (sizes.heads // sizes.kv_heads)
                pieces = torch.stack([pattern[head, target, source] * values[source, kv] for source in range(6)])
                torch.testing.assert_close(pieces.sum(0), z[target, head], atol=1e-5, rtol=1e-5)
                layered = model.anatomy.layers[layer]
                inner = sizes.head_width
                zeros = torch.zeros(6, 1, sizes.heads * inner)
                alone = zeros.clone()
                alone[:, 0, head * inner : (head + 1) * inner] = pieces
                with torch.no_grad():
                    out = (layered.output(alone) - layered.output(zeros))[:, 0] * layered.scale
                if layered.attn_post is not None:  # the norm at this run's scale, coordinate by coordinate
                    out = out * (write[target, head] / out.sum(0))
                brought |= {(head, source): out[source] for source in range(6)}
                torch.testing.assert_close(out.sum(0), write[target, head], atol=1e-5, rtol=1e-4)
            sizes_of = {key: near(part, state[target]) for key, part in brought.items()}
            stayed, mlp = near(before[target], state[target]), near(wrote[target], after[target])
            total = sum(sizes_of.values()) + stayed + (mlp if parallel else 0)
            for (head, source), size in sizes_of.items():
                assert float(found.heads[layer, 0, head, target, source]) == pytest.approx(size / total, abs=1e-5)
            assert float(found.stayed[layer, 0, target]) == pytest.approx(stayed / total, abs=1e-5)
            among = total if parallel else mlp + near(state[target], after[target])
            assert float(found.mlp[layer, 0, target]) == pytest.approx(mlp / among, abs=1e-5)
    assert bool((found.heads.triu(1) == 0).all())  # nothing is brought from later positions
    sums = found.heads.sum((2, 4)) + found.stayed + (found.mlp if parallel else 0)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.mlp + found.kept, torch.ones_like(found.mlp))


def test_routes_are_what_a_search_from_above_reaches():
    model = Model.load(tiny("gpt2"), tokenizer=Ids())
    found = flow(model, TOKENS)
    for threshold in (0.0, 0.05, 0.2):
        reached, rows = {(model.layers, 5)}, set()
        for level in reversed(range(model.layers)):
            for target in [at for height, at in reached if height == level + 1]:
                mlp, kept = float(found.mlp[level, 0, target]), float(found.kept[level, 0, target])
                if mlp > threshold:
                    rows.add((level, target, target, f"L{level}.mlp"))
                if mlp <= threshold and kept <= threshold:
                    continue
                if float(found.stayed[level, 0, target]) > threshold:
                    rows.add((level, target, target, "residual"))
                    reached.add((level, target))
                for head in range(4):
                    for source in range(6):
                        if float(found.heads[level, 0, head, target, source]) > threshold:
                            rows.add((level, source, target, f"L{level}.h{head}"))
                            reached.add((level, source))
        table = found.routes(threshold=threshold)
        assert set(table.select("level", "source", "target", "part").iter_rows()) == rows and table.height == len(rows)
        assert (table["share"] > threshold).all()
    with pytest.raises(PatchclampError, match="positions 0 to 5"):
        found.routes(position=6)


def test_padding_changes_nothing():
    model = Model.load(tiny("llama"), tokenizer=Ids())
    batch = examples(2, lengths=(6, 3)).batch()
    padded = flow(model, batch)
    for row in range(2):
        n = int(batch.mask[row].sum())
        alone = flow(model, batch.tokens[row][batch.mask[row]][None])
        torch.testing.assert_close(padded.heads[:, row, :, -n:, -n:], alone.heads[:, 0], atol=1e-5, rtol=1e-4)
        assert padded.heads[:, row].sum() == padded.heads[:, row, :, -n:, -n:].sum()  # padding brings nothing and gets nothing
        assert padded.tokens[row][-n:] == alone.tokens[0]


def test_the_planted_heads_are_told_from_texts_without_templates():
    """In the wired induction model L0.h1 brings the word before, and L1.h2 what followed the word the last time."""
    model = wired("induction")
    loaded = Model.load(model.hf, tokenizer=model.tokenizer)
    some = model.task.examples(model.tokenizer, 6, seed=1)
    table = flow_heads(loaded, [list(example.clean) for example in some])
    assert set(table["relation"]) == set(RELATIONS) and table["texts"].max() == 6
    best = table.sort("share", descending=True).group_by("site", maintain_order=True).first()
    relation = dict(zip(best["site"], best["relation"], strict=True))
    assert relation["L0.h1"] == "previous" and relation["L1.h2"] == "induction"
    assert (table["low"] <= table["share"] + 1e-9).all() and (table["share"] <= table["high"] + 1e-9).all()
    found = flow(loaded, torch.tensor([list(some[0].clean)]))
    parts = set(found.routes(threshold=1e-4)["part"])  # the wired stream carries a large constant, so that shares are small
    assert {"L1.h2", "L0.h1"} <= parts


def test_classes_of_tokens():
    said = ["Once", " upon", " a", " time", ",", " Tim", "my", " had", " 3", "\n"]
    kinds = [token_class(text, said[at - 1] if at else None) for at, text in enumerate(said)]
    assert kinds == ["first", "word", "word", "word", "punctuation", "capital", "continuation", "word", "number", "newline"]
    with pytest.raises(PatchclampError, match="two tokens"):
        flow_heads(Model.load(tiny("gpt2"), tokenizer=Ids()), [[5]])
