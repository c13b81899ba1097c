"""Circuit: a set that knows where it came from."""

import pytest

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError, SiteError
from patchclamp.sites import Edge, Site

ONE = Circuit(["L9.h6", "L0.mlp", "L2.h10", "L2.h9"], {"method": "threshold", "k": 4})
TWO = Circuit([Site("head", 9, 6), Site("mlp", 3)], {"method": "greedy"})


def test_set_operations() -> None:
    assert set(map(str, ONE & TWO)) == {"L9.h6"}
    assert len(ONE | TWO) == 5 and len(ONE - TWO) == 3
    assert ONE.jaccard(TWO) == 1 / 5 and Circuit([]).jaccard(Circuit([])) == 1
    assert (ONE & TWO).about == {"operation": "&", "of": [dict(ONE.about), dict(TWO.about)]}


def test_order_is_forward_and_membership_takes_text() -> None:
    assert list(map(str, ONE)) == ["L0.mlp", "L2.h9", "L2.h10", "L9.h6"]
    assert "L9.h6" in ONE and Site("head", 9, 6) in ONE and "L9.h7" not in ONE
    with pytest.raises(SiteError):
        _ = "L9.h" in ONE


def test_equal_where_the_parts_are() -> None:
    assert Circuit(ONE.sites) == ONE and hash(ONE) == hash(Circuit(ONE.sites)) and ONE != TWO


def test_json_round_trip() -> None:
    mixed = ONE | Circuit([Edge.parse("L2.mlp>L9.h6.q")])
    again = Circuit.from_json(mixed.to_json())
    assert again == mixed and again.about == mixed.about and again.to_json() == mixed.to_json()
    with pytest.raises(PatchclampError, match="no list of sites"):
        Circuit.from_json("[1]")


def test_showing() -> None:
    assert str(TWO) == "Circuit of 2 parts (method greedy): L3.mlp, L9.h6"
    assert "<td>L2.h9, L2.h10</td>" in ONE._repr_html_()
    assert "<script" not in Circuit(["embed"], {"task": "<script>"})._repr_html_()
