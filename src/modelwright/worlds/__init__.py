"""Generated testbeds whose truth is known exactly."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelwright.errors import UserError, did_you_mean
from modelwright.worlds.base import World

#: What is typed, and the function that makes it: ``function(seed, **options) -> World``.
WORLDS = {
    "stdlib_text": "modelwright.worlds.stdlib_text:stdlib_text",
    "domains": "modelwright.worlds.domains:domains",
    "graded": "modelwright.worlds.domains:graded",
    "facts": "modelwright.worlds.facts:facts",
    "retrieval": "modelwright.worlds.retrieval:retrieval",
    "analogies": "modelwright.worlds.analogies:analogies",
    "memorized": "modelwright.worlds.memorized:memorized",
    "copying": "modelwright.worlds.copying:copying",
    "task_stream": "modelwright.worlds.task_stream:task_stream",
    "pictures": "modelwright.worlds.pictures:pictures",
    "fact_pairs": "modelwright.worlds.fact_pairs:fact_pairs",
}

#: Not a value that could be typed or kept with the result.
_ONLY_IN_PYTHON = {"root"}


def world_function(name: str) -> Callable[..., World]:
    """Returns the function that makes the world of that name; ``-`` and ``_`` are the same.

    Raises:
        UserError: There is no such world.
    """
    name = name.replace("-", "_")
    if name not in WORLDS:
        raise UserError(f"There is no world '{name}': {did_you_mean(name, WORLDS)}")
    module, function = WORLDS[name].split(":")
    return getattr(importlib.import_module(module), function)


def make_world(name: str, seed: int = 0, options: Mapping[str, Any] | None = None) -> World:
    """Makes a world from options as they come from a command line or a recipe.

    Args:
        name: One of :data:`WORLDS`.
        seed: The world's seed.
        options: Keyword arguments of its function. Where it takes a sequence, one value or a string such as ``"1,2"``
            will do.

    Raises:
        UserError: The world or an option is unknown, or an option is of the wrong type or out of range.
    """
    function = world_function(name)
    hints = typing.get_type_hints(function)
    known = [key for key in inspect.signature(function).parameters if key not in {"seed", *_ONLY_IN_PYTHON}]
    checked = {}
    for key, value in (options or {}).items():
        key = key.replace("-", "_")
        if key not in known:
            raise UserError(f"The world '{name}' has no option '{key}': {did_you_mean(key, known)}")
        checked[key] = _checked(name, key, value, hints[key])
    return function(seed, **checked)


def _checked(world: str, key: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is Sequence:
        (item,) = typing.get_args(hint)
        if isinstance(value, str):
            value = [_number(part, item) for part in value.split(",") if part.strip()]
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        return [_checked(world, key, one, item) for one in items]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # A truth value is an int in Python, but never one that was meant.
    if hint is Any or (isinstance(value, hint) and isinstance(value, bool) == (hint is bool)):
        return value
    raise UserError(f"The option '{key}' of the world '{world}' is {value!r}: give a value of type {hint.__name__}.")


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text  # refused by the type check, with its message
