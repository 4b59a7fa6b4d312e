"""Making selectors from options as they come from a command line or a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from modelwright import catalog
from modelwright.curation.selector import Selector, SelectorMixin, make_selector
from modelwright.errors import UserError
from modelwright.verbs.base import Arg


@dataclass(kw_only=True)
class Example(SelectorMixin):
    level: Annotated[int, Arg("A whole number.")] = 1
    rate: Annotated[float | None, Arg("A number.")] = None
    kind: Annotated[Literal["a", "b"], Arg("A choice.")] = "a"
    on: Annotated[bool, Arg("A switch.")] = False
    names: Annotated[list[str] | None, Arg("Names.")] = None


@pytest.fixture(autouse=True)
def _example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "load", lambda kind, name: Example)


def test_the_mixin_fulfils_the_protocol_and_adds_no_options() -> None:
    assert isinstance(Example(), Selector)
    assert repr(Example()) == "Example(level=1, rate=None, kind='a', on=False, names=None)"
    with pytest.raises(UserError, match="no report yet"):
        _ = Example().report


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"level": "3"}, Example(level=3)),
        ({"level": "1e3"}, Example(level=1000)),
        ({"level": str(2**60 + 1)}, Example(level=2**60 + 1)),
        ({"rate": "0.5"}, Example(rate=0.5)),
        ({"rate": "none"}, Example(rate=None)),
        ({"rate": 2}, Example(rate=2.0)),
        ({"kind": "b"}, Example(kind="b")),
        ({"on": "true"}, Example(on=True)),
        ({"on": False}, Example(on=False)),
        ({"names": "x,y"}, Example(names=["x", "y"])),
    ],
)
def test_values_are_converted(given: dict, expected: Example) -> None:
    assert make_selector("example", given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lvl": 1}, "'example' has no option 'lvl': did you mean 'level'"),
        ({"level": "1.5"}, "'level' of 'example' must be a whole number, not '1.5'"),
        ({"level": None}, "must be a whole number, not None"),
        ({"rate": "fast"}, "must be a number, not 'fast'"),
        ({"kind": "c"}, "cannot be 'c'"),
        ({"on": "maybe"}, "must be true or false"),
    ],
)
def test_wrong_options_are_one_sentence(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_selector("example", given)
