"""What checks signatures in every other test does find what is wrong with them."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

from checking import jaxtyped

checked: Callable[[Any], Any] = partial(jaxtyped, typechecker=beartype)
ROW, COLUMN = torch.zeros(3), torch.zeros(4)


@checked
def joined(one: Float[Tensor, " n"], other: Float[Tensor, " n"], *, wrong: bool = False) -> Float[Tensor, "n n"]:
    return torch.zeros(3, 4) if wrong else one[:, None] * other


def test_axes_agree_among_arguments_and_with_what_is_returned() -> None:
    assert joined(ROW, ROW).shape == (3, 3) and joined(COLUMN, other=COLUMN).shape == (4, 4)  # another call, another n
    for call in (
        lambda: joined(ROW, COLUMN),
        lambda: joined(ROW, other=COLUMN),
        lambda: joined(ROW, ROW, wrong=True),
        lambda: joined(ROW.long(), ROW),
        lambda: joined(ROW, ROW[None]),
        lambda: joined(ROW, ROW, wrong=1),
    ):
        with pytest.raises(Exception, match="violates type hint"):
            call()
    assert joined(ROW, ROW).shape == (3, 3)  # no scope is left behind


def test_a_call_inside_a_call_has_axes_of_its_own() -> None:
    @checked
    def outer(one: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        joined(COLUMN, COLUMN)
        plain([COLUMN])
        return one

    @checked
    def plain(several: list[Float[Tensor, " n"]] | None) -> int:
        return len(several or ())

    assert outer(ROW) is ROW
    with pytest.raises(Exception, match="violates type hint"):
        plain([ROW.long()])


def test_dataclasses_methods_and_what_names_no_axis() -> None:
    @checked
    @dataclass(frozen=True)
    class Pair:
        one: Float[Tensor, " n"]
        other: Float[Tensor, " n"]
        name: str = ""

        @staticmethod
        @checked
        def of(size: int) -> "Pair":
            return Pair(torch.zeros(size), torch.zeros(size))

        @property
        @checked
        def size(self) -> int:
            return len(self.one) if self.name == "" else self.name  # type: ignore[return-value]

        @checked
        def later(self) -> Iterator[Float[Tensor, " n"]]:
            yield self.one
            yield COLUMN

    assert Pair.of(2).size == 2 and [len(one) for one in Pair(ROW, ROW).later()] == [3, 4]
    for call in (
        lambda: Pair(ROW, COLUMN),
        lambda: Pair(ROW, ROW, name=3),  # type: ignore[arg-type]
        lambda: Pair.of("2"),  # type: ignore[arg-type]
        lambda: Pair(ROW, ROW, "a").size,
    ):
        with pytest.raises(Exception, match="violates type hint"):
            call()


def test_functions_inside_functions_are_checked_each_time() -> None:
    """Two of the same code live side by side: each calls its own, with its own defaults, and both are checked."""

    def made(size: int) -> Any:
        @checked
        def inner(one: Float[Tensor, " n"], other: Float[Tensor, " n"], add: int = size) -> Float[Tensor, " n"]:
            return (one + other)[:size] + add

        @checked
        def word(text: str = str(size)) -> str:
            return text if size < 9 else size  # type: ignore[return-value]

        return inner, word

    (three, short), (four, _), (nine, wrong) = made(3), made(4), made(9)
    assert three(ROW, ROW).tolist() == [3.0] * 3 and four(COLUMN, COLUMN).tolist() == [4.0] * 4
    assert short() == "3" and short("a") == "a" and nine(ROW, ROW, add=1).tolist() == [1.0] * 3
    for call in (
        lambda: three(COLUMN, COLUMN),  # the first four: what it returns is shorter
        lambda: four(ROW, COLUMN),
        lambda: four(COLUMN, COLUMN, add="1"),
        lambda: short(3),
        wrong,
    ):
        with pytest.raises(Exception, match="violates type hint"):
            call()
    assert four.__name__ == "inner" and list(inspect.signature(four).parameters) == ["one", "other", "add"]


def test_what_arguments_say_of_sizes_is_checked() -> None:
    @checked
    def doubled(one: Float[Tensor, " n"], times: int) -> Float[Tensor, " {times}*n"]:
        return one.repeat(2)

    assert len(doubled(ROW, 2)) == 6
    with pytest.raises(Exception, match="return value"):
        doubled(ROW, 3)


def test_signatures_are_kept() -> None:
    assert list(inspect.signature(joined).parameters) == ["one", "other", "wrong"] and joined.__name__ == "joined"
    assert joined.__kwdefaults__ is None or joined.__kwdefaults__ == {"wrong": False}


def test_the_package_is_checked() -> None:
    from patchclamp.metrics import METRICS
    from patchclamp.sites import Site

    assert hasattr(Site.__init__, "checked")
    with pytest.raises(Exception, match="violates type hint"):
        Site(3)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="violates type hint"):
        METRICS["kl"](torch.zeros(2, 3), None, None)  # type: ignore[arg-type]
