"""Names and files of other tools: against what their own code would count and call, there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError, SiteError
from patchclamp.exchange import (
    Sizes,
    edge_name,
    edge_of,
    from_graph,
    hook_of,
    load_graph,
    part_name,
    part_of,
    read_submission,
    save_graph,
    site_of,
    to_graph,
    write_submission,
)
from patchclamp.exchange.names import edge_names
from patchclamp.exchange.submission import SHARES
from patchclamp.scores import Scores
from patchclamp.sites import Edge, Site

GPT2 = Sizes(12, 12, 12, 768)
SHARED = Sizes(2, 4, 2, 32, rotary=True)
"""Grouped-query attention: heads 0 and 1 read key/value head 0."""


def test_all_edges_are_counted_as_they_are_there():
    """The numbers of circuits.md: GPT-2 small and XL, Qwen2.5-0.5B, Llama-3.1-8B, InterpBench; Pythia's blocks are parallel."""
    for sizes, count in (
        (GPT2, 32_491),
        (Sizes(48, 25, 25, 1600), 2_235_025),
        (Sizes(24, 14, 2, 896), 179_749),
        (Sizes(26, 8, 4, 2304), 74_218),
        (Sizes(6, 4, 4, 64), 1_108),
    ):
        names = edge_names(sizes)
        assert len(names) == len(set(names)) == count
    heads, layers = 4, 3
    parallel = sum((3 * heads + 1) * (1 + layer * (heads + 1)) for layer in range(layers)) + 1 + layers * (heads + 1)
    assert len(edge_names(Sizes(layers, heads, heads, 8, parallel=True))) == parallel


@pytest.mark.parametrize("sizes", [SHARED, Sizes(2, 3, 3, 12, parallel=True)])
def test_edges_go_there_and_back(sizes: Sizes):
    back: dict[Edge, list[str]] = {}
    for name in edge_names(sizes):
        back.setdefault(edge_of(name, sizes), []).append(name)
    for edge, names in back.items():
        assert sorted(edge_name(edge, sizes)) == sorted(names)
    slots = [edge for edge in back if edge.target.kind in ("k", "v")]
    assert all(len(back[edge]) == sizes.group for edge in slots)
    assert edge_of("a0.h1->a1.h3<k>", SHARED) == Edge.parse("L0.h1>L1.kv1.k") == edge_of("a0.h1->a1.h2<k>", SHARED)
    assert edge_name(Edge.parse("embed>L0.h3.q"), SHARED) == ("input->a0.h3<q>",)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a0.h1->a1.h3", "queries, keys or values"),
        ("a0.h1->m1<q>", "queries, keys or values"),
        ("a1.h1->a0.h0<q>", "not in the stream"),
        ("a0.h1->a0.h2<v>", "not in the stream"),
        ("m0->m0", "not in the stream"),
        ("logits->m1", "from the end"),
        ("a0.h9->m1", "head 9, and there are 4"),
        ("a7.h1->logits", "layer 7, and there are 2"),
        ("L0.h1>logits", "no edge"),
        ("x3->logits", "no node"),
    ],
)
def test_edges_that_are_none_say_why(name: str, why: str):
    with pytest.raises(SiteError, match=why):
        edge_of(name, SHARED)


def test_hooks_are_the_places_that_they_name():
    for hook, site in (
        ("blocks.9.attn.hook_z", "L9.z"), ("blocks.9.hook_mlp_out", "L9.mlp.write"), ("blocks.0.hook_resid_pre", "L0.resid.pre"),
        ("blocks.11.hook_resid_post", "L11.resid.post"), ("blocks.3.attn.hook_pattern", "L3.pattern"), ("hook_embed", "embed"),
        ("blocks.3.attn.hook_q", "L3.q"), ("blocks.3.mlp.hook_post", "L3.mlp.n"), ("ln_final.hook_normalized", "final"),
        ("blocks.3.hook_attn_out", "L3.attn.write"), ("blocks.3.attn.hook_attn_scores", "L3.scores"),
    ):  # fmt: skip
        assert str(site_of(hook, GPT2)) == site and hook_of(Site.parse(site), GPT2) == hook
    assert hook_of(Site.parse("L9.h6"), GPT2) == "blocks.9.attn.hook_z"
    assert str(site_of("blocks.3.hook_mlp_in", GPT2)) == "L3.mlp" and str(site_of("blocks.3.hook_k_input", GPT2)) == "L3.k"
    # rotated queries and keys are what sites hold; those before are another thing
    assert hook_of(Site.parse("L1.h0.q"), SHARED) == "blocks.1.attn.hook_rot_q"
    for hook, sizes, why in (
        ("blocks.1.attn.hook_q", SHARED, "hook_rot_q"), ("blocks.1.attn.hook_rot_k", GPT2, "use blocks.1.attn.hook_k"),
        ("blocks.1.hook_nothing", GPT2, "no hook"), ("blocks.12.hook_resid_pre", GPT2, "there are 12: 0 to 11"),
    ):  # fmt: skip
        with pytest.raises(SiteError, match=why):
            site_of(hook, sizes)
    with pytest.raises(SiteError, match="has no hook"):
        hook_of(Site.parse("L3.router"), GPT2)


def test_nodes_go_there_and_back():
    for name in ("input", "a9.h6", "m0", "logits"):
        assert part_name(part_of(name, GPT2)) == name
    assert part_of("a9.6", GPT2) == Site("head", 9, 6)
    with pytest.raises(SiteError, match="no name as a node"):
        part_name(Site.parse("L3.h1@S2"))


def test_a_graph_file_as_it_is_written_there(tmp_path):
    """Written out by hand from the published format: two layers of two heads, one scored edge into a key of head 1."""
    body = {
        "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {name: {"in_graph": True} for name in ("input", "a0.h0", "a0.h1", "m0", "logits")},
        "edges": {"input->a0.h1<k>": {"score": -2.5, "in_graph": True}, "input->m0": {"score": 0.5, "in_graph": False}},
    }
    (tmp_path / "graph.json").write_text(json.dumps(body))
    found = load_graph(tmp_path / "graph.json")
    assert found.scores is not None and found.circuit is not None
    assert dict(zip(map(str, found.scores.sites), found.scores.values(), strict=True)) == {
        "embed>L0.kv1.k": -2.5,
        "embed>L0.mlp": 0.5,
    }
    assert found.circuit == Circuit(["embed>L0.kv1.k"])


def test_scores_and_circuits_go_there_and_back(tmp_path):
    labels = sorted({edge_of(name, SHARED) for name in edge_names(SHARED)})
    scores = Scores.of(labels, [0.5 * number - 7 for number in range(len(labels))], {})
    circuit = Circuit(labels[3:40:4])
    body = to_graph(SHARED, scores, circuit)
    assert set(body["edges"]) == set(edge_names(SHARED)) and body["nodes"]["logits"]["in_graph"]
    shared = body["edges"]["a0.h1->a1.h2<k>"]["score"]
    assert shared == body["edges"]["a0.h1->a1.h3<k>"]["score"] == scores["L0.h1>L1.kv1.k"]["score"] / 2
    again = load_graph(save_graph(tmp_path / "one.json", body), kv_heads=2)
    assert again.circuit == circuit and again.scores is not None
    assert again.scores.sites == scores.sites and again.scores.values().tolist() == pytest.approx(scores.values().tolist())
    assert not list(tmp_path.glob(".*"))
    nodes = Scores.of([Site.parse("L0.h1"), Site.parse("L1.mlp")], [1.0, -1.0], {})
    back = from_graph(to_graph(SHARED, nodes, Circuit(["L0.h1"])))
    assert back.scores is not None and back.scores.values().tolist() == [1.0, -1.0] and back.circuit == Circuit(["L0.h1"])


def matrices(body: dict[str, Any]) -> dict[str, Any]:
    """A graph file's body in the published form of tensors, written out here: rows are sources in order, columns what reads."""
    layers, heads = body["cfg"]["n_layers"], body["cfg"]["n_heads"]
    sources = [
        "input",
        *(name for layer in range(layers) for name in (*(f"a{layer}.h{head}" for head in range(heads)), f"m{layer}")),
    ]
    readers = [
        *(
            name
            for layer in range(layers)
            for name in (*(f"a{layer}.h{head}<{slot}>" for slot in "qkv" for head in range(heads)), f"m{layer}")
        ),
        "logits",
    ]
    scores, inside = torch.zeros(len(sources), len(readers)), torch.zeros(len(sources), len(readers), dtype=torch.bool)
    for name, row in body["edges"].items():
        source, _, reader = name.partition("->")
        scores[sources.index(source), readers.index(reader)] = row["score"]
        inside[sources.index(source), readers.index(reader)] = row["in_graph"]
    kept = torch.tensor([body["nodes"][name]["in_graph"] for name in sources])
    return {"cfg": dict(body["cfg"]), "src_nodes": sources, "dst_nodes": readers, "edges_scores": scores, "edges_in_graph": inside,
            "nodes_in_graph": kept}  # fmt: skip


def test_a_file_of_tensors_is_read_as_its_json_is(tmp_path: Path):
    labels = sorted({edge_of(name, SHARED) for name in edge_names(SHARED)})
    scores, circuit = Scores.of(labels, [0.5 * number - 7 for number in range(len(labels))], {}), Circuit(labels[3:40:4])
    body = to_graph(SHARED, scores, circuit)
    torch.save(matrices(body), tmp_path / "one.pt")
    again, plain = load_graph(tmp_path / "one.pt", kv_heads=2), load_graph(save_graph(tmp_path / "one.json", body), kv_heads=2)
    assert again.sizes == plain.sizes and again.circuit == plain.circuit == circuit
    assert again.scores is not None and plain.scores is not None and again.scores.sites == plain.scores.sites
    assert again.scores.values().tolist() == pytest.approx(plain.scores.values().tolist())  # their tensors are float32
    (tmp_path / "ioi_tiny").mkdir()
    torch.save(matrices(to_graph(SHARED, scores)), tmp_path / "ioi_tiny" / "importances.pt")
    cell = read_submission(tmp_path / "ioi_tiny", kv_heads=2)
    assert cell.circuits is None and cell.scores is not None and cell.scores.sites == scores.sites


def test_scores_of_nodes_are_read_beside_edges_that_have_none(tmp_path: Path):
    """As published: every edge is there with 0, and a node without a score has NaN."""
    body = matrices(to_graph(SHARED, None, Circuit(["L0.h1>logits"])))
    body["edges_in_graph"][:] = False
    scores = torch.full((len(body["src_nodes"]),), torch.nan)
    scores[body["src_nodes"].index("m0")], scores[body["src_nodes"].index("a1.h2")] = 0.5, -2.0
    torch.save(body | {"nodes_scores": scores}, tmp_path / "nodes.pt")
    found = load_graph(tmp_path / "nodes.pt")
    assert found.scores is not None
    assert dict(zip(map(str, found.scores.sites), found.scores.values().tolist(), strict=True)) == {"L0.mlp": 0.5, "L1.h2": -2.0}


class Runs:
    """What a pickle can do: call something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_file_of_tensors_is_run(tmp_path: Path):
    body = matrices(to_graph(SHARED, None, Circuit(["L0.h1>logits"])))
    torch.save({**body, "more": Runs(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(PatchclampError, match="nothing is run"):
        load_graph(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({name: value for name, value in body.items() if name != "cfg"}, tmp_path / "cfg.pt")
    torch.save({**body, "edges_scores": body["edges_scores"][1:]}, tmp_path / "short.pt")
    torch.save({**body, "dst_nodes": ["m0", *body["dst_nodes"][1:]]}, tmp_path / "names.pt")
    for name, why in (("text", "cannot be read"), ("list", "holds a list"), ("cfg", "no cfg"), ("short", "edges_scores is to be"),
                      ("names", "leave out")):  # fmt: skip
        with pytest.raises(PatchclampError, match=why):
            load_graph(tmp_path / f"{name}.pt")


def test_graph_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[1]")
    for name, why in (
        ("a.json", "cannot be read"),
        ("b.json", "no graph file"),
        ("c.json", "cannot be read"),
        ("d.pt", "cannot be read"),
    ):
        with pytest.raises(PatchclampError, match=why):
            load_graph(tmp_path / name)
    config = {"n_layers": 1, "n_heads": 2, "d_model": 8}
    for body, why in (
        ({"cfg": config}, "fields cfg, nodes and edges"), ({"cfg": {}, "nodes": {}, "edges": {}}, "n_layers, n_heads, d_model"),
        ({"cfg": config, "nodes": {}, "edges": {"input->m0": {"score": float("nan")}}}, "expected a number"),
        ({"cfg": config, "nodes": {}, "edges": {"input->m0": 3}}, "a mapping"),
    ):  # fmt: skip
        with pytest.raises(PatchclampError, match=why):
            from_graph(body)
    edge, node = Circuit(["embed>L0.mlp"]), Circuit(["L0.h1"])
    for given, why in (({}, "neither was given"), ({"circuit": edge | node}, "have both"), ({"circuit": Circuit(["L9.h1"])}, "no node"),
                       ({"circuit": Circuit(["embed>L9.mlp"])}, "no edge")):  # fmt: skip
        with pytest.raises(PatchclampError, match=why):
            to_graph(SHARED, **given)


def test_a_submission_goes_there_and_back(tmp_path):
    sizes = Sizes(4, 8, 8, 32)
    labels = [edge_of(name, sizes) for name in edge_names(sizes)]
    scores = Scores.of(labels, [float(number % 17) - 3 for number in range(len(labels))], {})
    (file,) = write_submission(tmp_path / "ioi_small", sizes, scores)
    assert file.name == "importances.json"
    again = read_submission(tmp_path / "ioi_small")
    assert again.circuits is None and again.scores is not None
    assert [again.scores[edge]["score"] for edge in labels] == scores.values().tolist()
    circuits = {share: Circuit(labels[: max(1, int(share * len(labels)))]) for share in SHARES}
    files = write_submission(tmp_path / "gt_small", sizes, None, circuits)
    assert len(files) == 9
    for number, path in enumerate(files):  # whatever they are called
        path.rename(path.with_name(f"circuit{number}.json"))
    assert read_submission(tmp_path / "gt_small").circuits == circuits
    with pytest.raises(PatchclampError, match="at most"):
        write_submission(tmp_path / "x", sizes, None, {**circuits, 0.001: circuits[0.5]})
    with pytest.raises(PatchclampError, match="one for each"):
        write_submission(tmp_path / "x", sizes, None, {0.1: circuits[0.1]})
    with pytest.raises(PatchclampError, match="one of the two"):
        write_submission(tmp_path / "x", sizes)
    assert not (tmp_path / "x").exists()
    save_graph(tmp_path / "gt_small" / "importances.json", to_graph(sizes, scores))
    for folder, why in (("gt_small", "beside other files"), ("none", "no folder"), (".", "no .json or .pt file")):
        with pytest.raises(PatchclampError, match=why):
            read_submission(tmp_path / folder)
