"""References such as ``${world.output}/pool.jsonl`` inside a recipe's values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modelwright.recipes.source import Place

#: First words of references that are not names of steps.
RESERVED = ("matrix", "recipe", "seeds")
# `$${` stands for a literal `${`.
_PATTERN = re.compile(r"\$\$\{|\$\{([^{}]*)\}")


class ReferenceProblem(Exception):
    """A reference that means nothing; the caller adds file and line."""

    def __init__(self, place: Place, problem: str) -> None:
        super().__init__(problem)
        self.place, self.problem = place, problem


@dataclass(frozen=True)
class Reference:
    """``${root.path}``.

    Attributes:
        root: A step's name, or one of :data:`RESERVED`.
        path: What follows, split at the dots.
    """

    root: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return "${" + ".".join((self.root, *self.path)) + "}"


Lookup = Callable[[Reference, Place], Any]


def _parse(inside: str, text: str, place: Place) -> Reference:
    parts = inside.strip().split(".")
    if not all(parts):
        raise ReferenceProblem(place, f"{text!r} is not a reference: write ${{step.output}} or ${{step.result.name}}.")
    return Reference(parts[0], tuple(parts[1:]))


def _check_closed(template: str, place: Place) -> None:
    if "${" in _PATTERN.sub("", template):
        raise ReferenceProblem(place, f"{template!r} has a '${{' without its '}}' (write $${{ for a literal one).")


def references(template: Any, place: Place = ()) -> Iterator[tuple[Place, Reference]]:
    """Yields every reference in nested values, with its place.

    Raises:
        ReferenceProblem: A reference is malformed.
    """
    if isinstance(template, dict):
        for key, value in template.items():
            yield from references(value, (*place, key))
    elif isinstance(template, list):
        for i, value in enumerate(template):
            yield from references(value, (*place, i))
    elif isinstance(template, str):
        _check_closed(template, place)
        for match in _PATTERN.finditer(template):
            if match[1] is not None:
                yield place, _parse(match[1], match[0], place)


def substitute(template: Any, lookup: Lookup, place: Place = ()) -> Any:
    """Returns nested values with every reference replaced by what ``lookup`` says.

    A reference that is the whole string keeps its type; inside a longer string it must be a plain value.

    Raises:
        ReferenceProblem: A reference is malformed, or a list or mapping stands inside a longer string.
    """
    if isinstance(template, dict):
        return {key: substitute(value, lookup, (*place, key)) for key, value in template.items()}
    if isinstance(template, list):
        return [substitute(value, lookup, (*place, i)) for i, value in enumerate(template)]
    if not isinstance(template, str):
        return template
    _check_closed(template, place)
    whole = _PATTERN.fullmatch(template)
    if whole and whole[1] is not None:
        return lookup(_parse(whole[1], whole[0], place), place)

    def text_of(match: re.Match[str]) -> str:
        if match[1] is None:
            return "${"
        value = lookup(_parse(match[1], match[0], place), place)
        if isinstance(value, (list, dict)):
            kind = f"a list of {len(value)}" if isinstance(value, list) else "a mapping"
            raise ReferenceProblem(place, f"{match[0]} is {kind}, so it cannot stand inside a longer text.")
        return str(value)

    return _PATTERN.sub(text_of, template)


def dig(value: Any, path: tuple[str, ...]) -> Any:
    """Follows keys and list indices into nested values.

    Raises:
        KeyError: There is no such key; its argument is the key, and the keys that there are.
    """
    for key in path:
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            known = (
                list(value)
                if isinstance(value, dict)
                else [str(i) for i in range(len(value or ()))]
                if isinstance(value, list)
                else []
            )
            raise KeyError(key, known)
    return value
