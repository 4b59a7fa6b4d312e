"""A step's matrix: its combinations, and how one step's combinations meet another's."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from modelwright.errors import did_you_mean
from modelwright.recipes.references import Reference, ReferenceProblem, dig, substitute
from modelwright.recipes.source import Place


@dataclass(frozen=True)
class Point:
    """One combination of matrix values.

    Attributes:
        at: Dimension to the value, or to its label where the value is a mapping.
        values: Dimension to the value itself.
    """

    at: dict[str, Any]
    values: dict[str, Any]

    def meets(self, other: Point) -> bool:
        """Whether both stand at the same label in every dimension that they share."""
        return all(label(self.at[d]) == label(other.at[d]) for d in self.at.keys() & other.at.keys())

    def joined(self, other: Point) -> Point:
        """Returns the combination of both."""
        return Point({**self.at, **other.at}, {**self.values, **other.values})


def label(value: Any) -> str:
    """Returns a matrix value's label as text, as ids show it."""
    if isinstance(value, dict):
        value = value["label"]
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def points(matrix: dict[str, Any], exclude: list[dict[str, Any]], constants: dict[str, Any]) -> list[Point]:
    """Returns every combination in the order of the file, without the excluded ones.

    Args:
        matrix: Dimension to a list, or to a reference to one.
        exclude: Combinations to leave out.
        constants: Values of ``${seeds}`` and ``${recipe.folder}``.

    Raises:
        ReferenceProblem: Something is malformed; places begin with ``matrix`` or ``exclude``.
    """

    def lookup(reference: Reference, place: Place) -> Any:
        return constant(reference, place, constants)

    dimensions: dict[str, list[Any]] = {}
    for name, given in matrix.items():
        place = ("matrix", name)
        values = substitute(given, lookup, place)
        if not isinstance(values, list) or not values:
            raise ReferenceProblem(place, "a dimension is a list of at least one value, or ${seeds}.")
        for i, value in enumerate(values):
            if isinstance(value, list) or (
                isinstance(value, dict) and not isinstance(value.get("label"), (str, int, float))
            ):
                raise ReferenceProblem((*place, i), "a value is a plain one, or a mapping with a 'label'.")
        labels = [label(v) for v in values]
        for i, text in enumerate(labels):
            if text in labels[:i]:
                raise ReferenceProblem((*place, i), f"the value {text!r} stands twice in this dimension.")
        dimensions[name] = values
    rules = [_rule(rule, i, dimensions) for i, rule in enumerate(exclude)]
    found = []
    for combination in itertools.product(*dimensions.values()):
        values_at = dict(zip(dimensions, combination))
        at = {d: v["label"] if isinstance(v, dict) else v for d, v in values_at.items()}
        if not any(all(label(at[d]) in wanted for d, wanted in rule.items()) for rule in rules):
            found.append(Point(at, values_at))
    if not found:
        raise ReferenceProblem(
            ("exclude",), f"all {math.prod(map(len, dimensions.values()))} combinations are excluded."
        )
    return found


def _rule(rule: dict[str, Any], i: int, dimensions: dict[str, list[Any]]) -> dict[str, set[str]]:
    if not rule:
        raise ReferenceProblem(("exclude", i), "an empty rule would exclude everything.")
    found = {}
    for dimension, wanted in rule.items():
        place = ("exclude", i, dimension)
        if dimension not in dimensions:
            raise ReferenceProblem(place, f"the matrix has no such dimension: {did_you_mean(dimension, dimensions)}")
        labels = {label(v) for v in dimensions[dimension]}
        found[dimension] = {label(v) for v in (wanted if isinstance(wanted, list) else [wanted])}
        for unknown in found[dimension] - labels:
            raise ReferenceProblem(place, f"the dimension has no value {unknown!r}: {did_you_mean(unknown, labels)}")
    return found


def constant(reference: Reference, place: Place, constants: dict[str, Any]) -> Any:
    """Returns the value of ``${seeds}`` or ``${recipe.folder}``.

    Raises:
        ReferenceProblem: It is neither.
    """
    try:
        return dig(constants, (reference.root, *reference.path))
    except KeyError as error:
        known = [".".join(k) for k in (("seeds",), ("recipe", "folder"))]
        text = ".".join((reference.root, *reference.path))
        raise ReferenceProblem(place, f"{reference} means nothing here: {did_you_mean(text, known)}") from error


def matrix_value(reference: Reference, place: Place, point: Point) -> Any:
    """Returns the value of ``${matrix.dimension}``, or of a key of it where the value is a mapping.

    Raises:
        ReferenceProblem: There is no such dimension or key.
    """
    try:
        return dig(point.values, reference.path)
    except KeyError as error:
        key, known = error.args
        raise ReferenceProblem(
            place, f"{reference}: there is no '{key}': {did_you_mean(key, map(str, known))}"
        ) from error
