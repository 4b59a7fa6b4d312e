"""Makes a typer command from a verb's dataclass: the one schema that the command line and recipes share."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from modelwright.cli.guard import guarded
from modelwright.errors import UserError
from modelwright.options import Arg


def _parse_pairs(pairs: list[str], option: str) -> dict[str, Any]:
    """Reads ``key=value`` pairs; values are YAML, so ``level=1`` is a number and ``dedup=true`` a truth value."""
    import yaml

    from modelwright.values import parse_value

    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--{option} {pair!r} is not of the form key=value.")
        try:
            parsed[key] = parse_value(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{option} {pair!r}: {value!r} is not a valid value.") from error
    return parsed


def _plain(text: str) -> str:
    """Drops what a docstring's cross-references are written with: only the last name of each is for the terminal."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`|``([^`]+)``", lambda m: m[1] or m[2], text)


def _is_dict(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(o is dict or typing.get_origin(o) is dict for o in options)


def _is_sequence(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(typing.get_origin(o) in (list, tuple) for o in options)


def _parameters(cls: type, skip: set[str]) -> tuple[list[inspect.Parameter], set[str]]:
    """Returns the dataclass's fields as typer parameters, and the names of those given as key=value pairs."""
    hints = typing.get_type_hints(cls, include_extras=True)
    parameters, pairs = [], set()
    for field in dataclasses.fields(cls):
        if field.name in skip or not field.init or field.name.startswith("_"):
            continue
        hint, arg = hints[field.name], Arg("")
        if typing.get_origin(hint) is Annotated:
            hint, *metadata = typing.get_args(hint)
            arg = next((m for m in metadata if isinstance(m, Arg)), arg)
        default: Any = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if _is_dict(hint):
            hint, default = list[str], []
            pairs.add(field.name)
        if not arg.positional and _is_sequence(hint) and default is None:
            default = []
        if arg.kind == "methods":  # mappings in recipes, YAML on the command line
            hint = list[str]
        flag = "--" + field.name.rstrip("_").replace("_", "-")  # with_, for with is Python's
        if arg.positional:
            info = typer.Argument(help=arg.help, metavar=field.name.upper())
        elif hint is bool:
            names = [flag + ("" if default is False else f"/--no-{flag[2:]}")]
            info = typer.Option(*names, *([arg.short] if arg.short else []), help=arg.help)
        else:
            repeated, help_text = _is_sequence(hint) or field.name in pairs, arg.help
            if repeated and not re.search("repeat|several", help_text):
                help_text += " May be repeated."
            info = typer.Option(
                flag,
                *([arg.short] if arg.short else []),
                help=help_text,
                metavar="KEY=VALUE"
                if field.name in pairs
                else "<path>"
                if "Path" in str(hint) and repeated
                else "<str>"
                if repeated
                else None,
                show_default=default not in (None, [], ""),
            )
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]
            )
        )
    return parameters, pairs


def build_command(
    verb: type,
    *,
    fixed: dict[str, Any] | None = None,
    extra: type | None = None,
    extra_field: str = "",
    help_text: str = "",
) -> Any:
    """Returns the click command of a verb.

    Args:
        verb: A dataclass with ``run(progress) -> dict``.
        fixed: Fields that the command's name decides, so they are not options.
        extra: A second dataclass whose fields become options too, such as a selector's own.
        extra_field: The verb's dict field that receives the fields of ``extra`` which differ from their defaults.
        help_text: Help, instead of the verb's docstring.
    """
    fixed = fixed or {}
    parameters, pairs = _parameters(verb, skip={*fixed, extra_field})
    taken = {p.name for p in parameters}
    extra_parameters, extra_pairs = _parameters(extra, skip=taken) if extra else ([], set())
    own_json = "json" in taken
    if not own_json:
        parameters.append(
            inspect.Parameter(
                "json",
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, typer.Option("--json", help="Print the result as JSON.")],
            )
        )

    def command(**options: Any) -> None:
        as_json = options["json"] if own_json else options.pop("json")
        for name in pairs | extra_pairs:
            options[name] = _parse_pairs(options[name], name.replace("_", "-"))
        if extra:
            defaults = {p.name: p.default for p in extra_parameters}
            own = {n: options.pop(n) for n in defaults}
            options[extra_field] = {n: v for n, v in own.items() if v != defaults[n]}
        if not any(p.name == "json" for p in parameters if own_json):
            options.pop("json", None)
        from modelwright.cli.console import Console

        with Console() as console:
            instance = verb(**fixed, **options)
            result = instance.run(console)
        if as_json and not own_json:
            sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")
        elif hasattr(instance, "show"):
            instance.show(result)
        elif not own_json:
            _show(result)

    hidden = inspect.Signature(parameters + extra_parameters)
    command.__signature__ = hidden  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in hidden.parameters.values()}
    command.__doc__ = _plain(help_text or inspect.getdoc(verb) or "")
    command.__name__ = verb.__name__
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings={"max_content_width": 110})
    sections = _sections({p.name for p in extra_parameters}, fixed)
    app.command(cls=sections, no_args_is_help=any(p.default is inspect.Parameter.empty for p in parameters))(
        guarded(command)
    )
    return typer.main.get_command(app)


class _Command(TyperCommand):
    """A command whose help ends with the longer commands that begin with its name.

    Attributes:
        also: Each of them and what it does.
    """

    also: tuple[tuple[str, str], ...] = ()

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.also:
            with formatter.section("Also (each with --help)"):
                formatter.write_dl(list(self.also))


def _sections(own: set[str], fixed: dict[str, Any]) -> type[TyperCommand]:
    """Returns a command class whose help lists a method's own options apart from those that all methods have."""
    if not own:
        return _Command

    class Sectioned(_Command):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            common: list[Any] = []
            special: list[Any] = []
            for parameter in self.get_params(ctx):
                if (record := parameter.get_help_record(ctx)) is not None:
                    (special if parameter.name in own else common).append(record)
            for title, records in (("Options", common), (f"Options of {' '.join(fixed.values())}", special)):
                with formatter.section(title):
                    formatter.write_dl(records)

    return Sectioned


def _show(result: dict[str, Any]) -> None:
    """Prints a result for a person: plain values and small tables one a line, then up to three examples."""
    lines: dict[str, str] = {}
    for key, value in result.items():
        label = key.replace("_", " ")
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            lines |= {f"{label}, {inner}": _shown(v) for inner, v in value.items()}
        elif key != "examples":
            lines[label] = _shown(value)
    width = max((len(key) for key, value in lines.items() if value), default=0)
    for key, value in lines.items():
        if value:
            sys.stdout.write(f"{key:<{width}}  {value}\n")
    for answer in result.get("answers") or []:
        sys.stdout.write(f"{answer}\n")
    for warning in result.get("warnings") or []:
        sys.stdout.write(f"warning: {warning}\n")
    examples = [e for e in result.get("examples") or [] if isinstance(e, dict)][:3]
    for example in examples:
        cells = (" ".join(_shown(value).split()) for value in example.values())
        sys.stdout.write("  " + " | ".join(cell if len(cell) <= 120 else cell[:119] + "…" for cell in cells) + "\n")


def _shown(value: Any) -> str:
    """One value on one line; empty for what has no place there, such as lists and large tables."""
    if value is None or isinstance(value, list):
        return ""
    if isinstance(value, dict):
        cells = {str(k): _shown(v) for k, v in value.items() if not isinstance(v, dict)}
        cells = {k: v for k, v in cells.items() if v}
        few = len(cells) <= 8 and len(value) - len(cells) <= 2
        # A name with a dot is one of the model's weights: it stays as it is written in a config or in code.
        return ", ".join(f"{k if '.' in k else k.replace('_', ' ')} {v}" for k, v in cells.items()) if few else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
