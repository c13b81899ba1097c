"""The grammar of sites: what is printed parses back, sites sort in forward order, patterns fit what they say."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchclamp.errors import PatchclampError, SiteError
from patchclamp.sites import KINDS, PER_HEAD, PER_KV, Edge, Site, matches, select

numbers = st.integers(0, 300)
maybe = st.none() | numbers
positions = st.none() | st.integers(-300, 300) | st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True)
dictionaries = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_/-]{0,8}", fullmatch=True)


@st.composite
def sites(draw: Any) -> Site:
    """Any site that the grammar can write."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    position = draw(positions)
    feature = draw(maybe)
    dictionary = None if feature is None else draw(dictionaries)
    if kind in ("embed", "final", "logits"):
        return Site(kind, feature=feature, dictionary=dictionary, position=position)
    indexed = kind in (*PER_HEAD, *PER_KV, "head", "neuron", "expert")
    sub = draw(maybe) if kind == "expert" else None
    return Site(kind, draw(numbers), draw(maybe) if indexed else None, sub, feature, dictionary, position)


@given(sites())
def test_what_is_printed_parses_back(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert Site.parse(f"  {site} ") == site


@given(sites(), sites())
def test_edges_parse_back_or_run_backwards(one: Site, two: Site) -> None:
    text = f"{one}>{two}"
    if one.key[:2] < two.key[:2]:
        edge = Edge.parse(text)
        assert (edge.source, edge.target) == (one, two)
        assert str(edge) == text
        assert Edge.parse(f"{one}..{two}") == edge
    else:
        with pytest.raises(SiteError, match="runs backwards"):
            Edge.parse(text)


@given(st.lists(sites(), unique=True, max_size=20), st.randoms(use_true_random=False))
def test_order_does_not_depend_on_what_came_first(found: list[Site], chance: random.Random) -> None:
    shuffled = found[:]
    chance.shuffle(shuffled)
    assert sorted(found) == sorted(shuffled)


@given(sites())
def test_a_site_fits_its_own_text(site: Site) -> None:
    if "*" not in str(site):
        assert matches(str(site), site)


def test_every_form_of_the_grammar_by_hand() -> None:
    forms = {
        "embed": Site("embed"), "final": Site("final"), "logits": Site("logits"), "L5.resid.pre": Site("resid.pre", 5),
        "L5.resid.mid": Site("resid.mid", 5), "L5.resid.post": Site("resid.post", 5), "L9.attn": Site("attn", 9),
        "L9.mlp": Site("mlp", 9), "L9.attn.write": Site("attn.write", 9), "L9.mlp.write": Site("mlp.write", 9),
        "L9.h6": Site("head", 9, 6), "L9.h6.q": Site("q", 9, 6), "L9.h6.z": Site("z", 9, 6), "L9.h6.scores": Site("scores", 9, 6),
        "L9.h6.pattern": Site("pattern", 9, 6), "L9.h6.write": Site("write", 9, 6), "L9.z": Site("z", 9),
        "L9.kv2.k": Site("k", 9, 2), "L9.kv2.v": Site("v", 9, 2), "L9.k": Site("k", 9), "L3.mlp.n127": Site("neuron", 3, 127),
        "L3.mlp.n": Site("neuron", 3), "L3.router": Site("router", 3), "L3.mlp.e5": Site("expert", 3, 5),
        "L3.mlp.e5.n7": Site("expert", 3, 5, 7), "L5.resid.post.f1234:D": Site("resid.post", 5, feature=1234, dictionary="D"),
        "L9.h6@-1": Site("head", 9, 6, position=-1), "L9.h6@S2": Site("head", 9, 6, position="S2"),
        "L9.mlp@3": Site("mlp", 9, position=3), "L9.h6.z@prompt": Site("z", 9, 6, position="prompt"),
    }  # fmt: skip
    for text, site in forms.items():
        assert Site.parse(text) == site, text
        assert str(site) == text
    assert {site.kind for site in forms.values()} == set(KINDS)


def test_forward_order() -> None:
    texts = [
        "embed", "L0.resid.pre", "L0.h0.q", "L0.h1.q", "L0.kv0.k", "L0.kv0.v", "L0.h0.scores", "L0.h0.pattern", "L0.h0.z",
        "L0.h2",
        "L0.h10", "L0.h10@0", "L0.h10@2", "L0.h10@10", "L0.h10@-2", "L0.h10@-1", "L0.h10@end", "L0.h0.write", "L0.attn",
        "L0.attn.write",
        "L0.resid.mid", "L0.router", "L0.mlp.n3", "L0.mlp.e1", "L0.mlp", "L0.mlp.write", "L0.resid.post", "L0.resid.post.f1:A",
        "L0.resid.post.f1:B", "L1.resid.pre", "L10.attn", "final", "logits",
    ]  # fmt: skip
    ordered = [Site.parse(text) for text in texts]
    for seed in range(5):
        shuffled = ordered[:]
        random.Random(seed).shuffle(shuffled)
        assert [str(site) for site in sorted(shuffled)] == texts


def test_places() -> None:
    assert Site.parse("L2.h3@S2").place == Site("z", 2)
    assert Site.parse("L2.kv1.k").place == Site("k", 2)
    assert Site.parse("L2.mlp.n5@-1").place == Site("neuron", 2)
    assert Site.parse("logits@3").place == Site("logits")
    assert Site.parse("L2.mlp").at("S2") == Site.parse("L2.mlp@S2")


def test_patterns() -> None:
    there = [
        Site.parse(text) for text in ("embed", "L0.attn", "L0.h0", "L0.h1", "L0.h1.q", "L1.h0", "L1.mlp", "L2.mlp", "L12.mlp")
    ]

    def fit(*patterns: str) -> list[str]:
        return [str(site) for site in select(patterns, there)]

    assert fit("L*.mlp") == ["L1.mlp", "L2.mlp", "L12.mlp"]
    assert fit("L*.h*") == ["L0.h0", "L0.h1", "L1.h0"]
    assert fit("L0-1.h*") == ["L0.h0", "L0.h1", "L1.h0"]
    assert fit("L1-2.mlp") == ["L1.mlp", "L2.mlp"]
    assert fit("L*.h*.q", "embed") == ["embed", "L0.h1.q"]
    assert fit("L1.*") == ["L1.h0", "L1.mlp"]
    with pytest.raises(SiteError, match=r"'L3\.mlp' fits none of the 9 sites there are \(embed, L0\.attn"):
        fit("L3.mlp")
    edges = [Edge.parse("L0.h1>L1.h0.q"), Edge.parse("L0.h1>logits")]
    assert [matches("L*.h*..L*.h*.q", edge) for edge in edges] == [True, False]
    assert [matches("L0.h1>*", edge) for edge in edges] == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a site: sites look like embed"),
        ("L", "is not a site"),
        ("l5.attn", "is not a site"),
        ("L5", "is not a site"),
        ("L5.atn", "nothing in a layer is called 'atn'"),
        ("L5.h3.k", "nothing in a layer is called 'h3.k'"),
        ("L5.kv3.q", "nothing in a layer is called 'kv3.q'"),
        ("L5.attn@", "the position '' is neither a number nor the name of a span"),
        ("L5.attn@1.5", "the position '1.5' is neither"),
        ("embed.f3", "is not a site"),
    ],
)
def test_what_does_not_parse_says_so(text: str, message: str) -> None:
    with pytest.raises(SiteError) as caught:
        Site.parse(text)
    assert message in str(caught.value)
    assert isinstance(caught.value, PatchclampError)


def test_edges_that_do_not_parse() -> None:
    for text in ("L0.h1", "L0.h1>L1.h0>L2.h0"):
        with pytest.raises(SiteError, match="is not an edge: write SOURCE>TARGET"):
            Edge.parse(text)
    with pytest.raises(SiteError, match=r"L1\.mlp comes after L0\.h0\.q"):
        Edge.parse("L1.mlp>L0.h0.q")


# --- what derives from the table of kinds


def test_the_docs_are_made_from_the_table() -> None:
    from pathlib import Path

    from patchclamp.models.describe import page

    there = Path(__file__).parent.parent / "docs" / "sites.md"
    assert there.read_text() == page(), "run: .venv/bin/python -m patchclamp.models.describe > docs/sites.md"
    assert all(f"| {row.obtained} |" in page() for row in KINDS.values())


def test_a_models_sites_are_described() -> None:
    from cases import tiny
    from patchclamp.models.model import Model

    model = Model.load(tiny("qwen3_moe"))
    rows = {row["site"]: row for row in model.describe_sites()}
    assert len(rows) == len(KINDS)
    assert rows["L*.h*.q"]["axes"] == "batch, position, head 4, head_width 8" and rows["L*.h*.q"]["layers"] == "0-1"
    assert rows["L*.kv*.k"]["axes"] == "batch, position, kv_head 2, head_width 8"
    assert rows["L*.mlp.n"]["layers"] == "0" and "neuron 64" in str(rows["L*.mlp.n"]["axes"])
    assert rows["L*.mlp.n"]["absent"] == KINDS["neuron"].absent
    assert rows["L*.router"]["layers"] == "1" and rows["L*.router"]["absent"] == "the layer is not a mixture of experts"
    assert rows["logits"]["axes"] == "batch, position, token 97" and rows["embed"]["axes"] == "batch, position, width 32"
    assert rows["L*.h*.write"]["writable"] is False
    parallel = {row["site"]: row for row in Model.load(tiny("phi")).describe_sites()}
    assert parallel["L*.resid.mid"] | {"writable": True} == {
        "site": "L*.resid.mid", "layers": "", "axes": "", "writable": True, "obtained": "", "absent": "parallel blocks have no middle",
    }  # fmt: skip
    for pattern in rows:
        if rows[pattern]["layers"] != "0":
            assert model.find(str(pattern).replace("L*", "L1"))
