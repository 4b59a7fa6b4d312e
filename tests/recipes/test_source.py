"""YAML with line numbers, and overrides."""

from pathlib import Path

import pytest

from modelwright.errors import UserError
from modelwright.recipes.source import read_source


def read(text, *overrides):
    return read_source("r.yaml", Path(), text, overrides)


def test_scalars_are_those_of_yaml_1_2():
    text = "{a: 3e-4, b: no, c: 010, d: 1_000, e: 2024-01-01, f: true, g: null, h: -.5, i: 1:30, j: 2., k: '5', l: 1E5}"
    assert read(text).value == {
        "a": 3e-4, "b": "no", "c": "010", "d": 1000, "e": "2024-01-01", "f": True, "g": None, "h": -0.5, "i": "1:30",
        "j": 2.0, "k": "5", "l": 1e5,
    }  # fmt: skip


def test_every_key_and_item_has_its_line():
    source = read("a: 1\nb:\n  - x\n  - c: 2\n    d: 3\n")
    assert source.lines["b",] == 2
    assert source.lines["b", 1, "d"] == 5
    assert source.where(("b", 0)) == "r.yaml:3"
    assert source.where(("b", 1, "d", "deeper")) == "r.yaml:5"


def test_anchors_and_merges():
    source = read("base: &b {x: 1, y: 2}\nc:\n  <<: *b\n  y: 3\n")
    assert source.value["c"] == {"x": 1, "y": 3}
    source.value["c"]["x"] = 5
    assert source.value["base"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a stands twice, first in line 1"),
        ("s:\n  t:\n    x: 1\n    x: 1\n", "r.yaml:4: s.t.x stands twice, first in line 3"),
        ("a: 1\nb: [1, 2\nc: 3\n", "r.yaml:3: this is not valid YAML"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: this is not valid YAML"),
        ("a: *nowhere\n", "r.yaml:1: this is not valid YAML"),
        ("a: &x\n  - *x\n", "r.yaml:1: this YAML alias contains itself"),
        ("a: !!python/object/apply:os.system ['true']\n", "r.yaml:1: this is not valid YAML"),
        ("a: \x00\n", "r.yaml: this is not valid YAML"),
        ("{[1]: 2}", "r.yaml:1"),
        ("- a\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_bad_yaml_is_one_sentence_with_its_line(text, message):
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


TEXT = "name: x\nseeds: [0, 1]\nsteps:\n  train: {with: {steps: 5}}\n"


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("seeds=[7]", ("seeds",), [7]),
        ("seeds.1=9", ("seeds", 1), 9),
        ("steps.train.with.steps=50", ("steps", "train", "with", "steps"), 50),
        ("steps.train.with.rate=3e-4", ("steps", "train", "with", "rate"), 3e-4),
        ("steps.train.matrix.a=[1]", ("steps", "train", "matrix", "a"), [1]),
        ("title='a = b'", ("title",), "a = b"),
        ("name=", ("name",), None),
    ],
)
def test_overrides_set_a_value_and_are_named_in_errors(override, place, value):
    source = read(TEXT, override)
    found = source.value
    for key in place:
        found = found[key]
    assert found == value
    assert type(found) is type(value)
    assert str(source.error(place, "wrong.")) == f"--set {override}: {'.'.join(map(str, place))}: wrong."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.trian.with.steps=5", "there is no step 'trian': did you mean 'train'?"),
        ("seeds.5=1", "seeds is a list of 2; '5' is not an index"),
        ("seeds.x=1", "not an index"),
        ("name.x=1", "name is a plain value"),
        ("name", "not of the form"),
        ("a..b=1", "not of the form"),
        ("=1", "not of the form"),
        ("seeds=[1", "not a valid YAML value"),
    ],
)
def test_an_override_of_nothing_is_refused(override, message):
    with pytest.raises(UserError, match="--set") as error:
        read(TEXT, override)
    assert message in str(error.value)
