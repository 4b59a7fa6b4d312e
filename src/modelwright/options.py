"""Options as fields of a dataclass: how a field describes itself, and how text becomes its value."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modelwright.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Arg:
    """Metadata of an option: ``Annotated[int, Arg("Documents to keep.")]``.

    Attributes:
        help: One sentence for ``--help`` and the documentation.
        positional: Given by position on the command line instead of as ``--name``.
        short: A one-letter form such as ``-o``.
        kind: ``input`` (a file or folder that is read: recipes hash its content), ``output`` (written: recipes set it),
            ``run`` (how, not what: worker counts, ``force``; recipes leave it out of the cache key), ``methods``
            (decoding methods with their options: see :func:`modelwright.decoding.parts.read_parts`) or ``value``.
        filename: For an ``output``: the name a recipe gives it inside the step's folder.
    """

    help: str
    positional: bool = False
    short: str = ""
    kind: str = "value"
    filename: str = ""


def make_part(cls: Any, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Makes a part whose options are the fields of its dataclass.

    Args:
        cls: The dataclass.
        name: What the user calls it.
        options: Field to value; strings (from the command line) are converted to the field's type.

    Raises:
        UserError: No such option, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        key = key.replace("-", "_")
        if key not in known:
            raise UserError(f"'{name}' has no option '{key}': {did_you_mean(key, known)}")
        values[key] = _convert(value, hints[key], f"option '{key}' of '{name}'")
    return cls(**values)


def check_limit(limit: int | None, option: str = "--limit") -> None:
    """Checks "use only so many", where None means all.

    Raises:
        UserError: It is less than 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{option} is {limit}: give at least 1, or leave it out.")


def _convert(value: Any, hint: Any, what: str) -> Any:
    """Converts a value to an option's type, or says which type is expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or value in ("none", "null")):
            return None
        for argument in (a for a in arguments if a is not type(None)):
            try:
                return _convert(value, argument, what)
            except UserError as error:
                last = error
        raise last
    if origin is Literal:
        for argument in arguments:
            if value == argument or str(value) == str(argument):
                return argument
        raise UserError(f"The {what} cannot be {value!r}: {did_you_mean(str(value), map(str, arguments))}")
    if hint is bool:
        named = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in named:
            return named[str(value).lower()]
        raise UserError(f"The {what} must be true or false, not {value!r}.")
    if hint in (int, float):
        try:
            number = float(value)
            if hint is float:
                # A whole number stays one: some options take tokens as an int and shares as a float.
                return value if isinstance(value, int) and not isinstance(value, bool) else number
            if number.is_integer():
                # 1e6 means a million, but a large integer must not pass through a float.
                return int(number) if abs(number) < 2**53 else int(value)
        except (TypeError, ValueError):
            pass
        raise UserError(f"The {what} must be {'a whole number' if hint is int else 'a number'}, not {value!r}.")
    if origin in (list, tuple):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"The {what} must be a list, not {value!r}.")
        return origin(_convert(item, arguments[0], what) for item in items)
    if origin is dict and isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"The {what} must be a JSON object, not {value!r}.") from error
    if hint is str and (value is None or isinstance(value, (dict, list))):
        raise UserError(f"The {what} must be a text, not {value!r}.")
    return hint(value) if isinstance(hint, type) and not isinstance(value, hint) else value
