"""A verb's options as a recipe sees them: made from the dataclass, like the command line's."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.recipes.source import Place

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Option:
    """One field of a verb.

    Attributes:
        name: Its name under ``with:``.
        field: Its name in the dataclass, which differs where the name is a word of Python.
        hint: Its type, for pydantic.
        kind: :attr:`modelwright.options.Arg.kind`.
        filename: For an output: its name in the step's folder.
        default: Its default, or :data:`REQUIRED`.
    """

    name: str
    field: str
    hint: Any
    kind: str
    filename: str
    default: Any

    def convert(self, value: Any) -> Any:
        """Returns ``value`` in the option's type.

        Raises:
            OptionProblem: It does not fit.
        """
        from pydantic import ValidationError

        try:
            return _adapter(self.hint).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = tuple(part for part in first["loc"] if isinstance(part, int))
            message = first["msg"][:1].lower() + first["msg"][1:]
            raise OptionProblem((self.name, *place), f"{message}, but it is {_shown(first['input'])}.") from error


class OptionProblem(Exception):
    """A value does not fit its option; the caller adds file and line."""

    def __init__(self, place: Place, problem: str) -> None:
        super().__init__(problem)
        self.place, self.problem = place, problem


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def options_of(verb: type) -> dict[str, Option]:
    """Returns the options of a verb's dataclass by name."""
    hints = typing.get_type_hints(verb, include_extras=True)
    found = {}
    for field in dataclasses.fields(verb):
        if not field.init or field.name.startswith("_"):
            continue
        hint, arg = hints[field.name], Arg("")
        if typing.get_origin(hint) is Annotated:
            hint, *metadata = typing.get_args(hint)
            arg = next((m for m in metadata if isinstance(m, Arg)), arg)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        name = field.name.rstrip("_")
        found[name] = Option(name, field.name, hint, arg.kind, arg.filename, default)
    return found
