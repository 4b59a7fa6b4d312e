"""The root command. Verbs are loaded only when they are named or listed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import typer
from typer.core import TyperGroup

from modelwright.cli.from_verb import build_command

#: Commands that are not verbs: they look at the project and do no work on anyone's data.
_PLAIN: dict[str, str] = {
    "list": "modelwright.cli.list_methods:ListMethods",
    "show": "modelwright.cli.show_method:ShowMethod",
    "doctor": "modelwright.cli.doctor:Doctor",
}


def _plain_command(target: str) -> Any:
    module, attribute = target.split(":")
    return build_command(getattr(importlib.import_module(module), attribute))


def _lazy_group(name: str, help_text: str, commands: Mapping[str, Callable[[], Any]]) -> Any:
    """Returns a group whose commands are built when they are asked for."""

    class LazyGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(commands)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in commands:
                return None
            command = commands[cmd_name]()
            command.name = cmd_name
            return command

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            from modelwright.errors import did_you_mean

            if args and args[0] not in commands and not args[0].startswith("-"):
                ctx.fail(f"There is no '{args[0]}': {did_you_mean(args[0], commands)}")
            return super().resolve_command(ctx, args)

    app = typer.Typer(
        cls=LazyGroup,
        name=name,
        help=help_text,
        add_completion=False,
        rich_markup_mode=None,
        no_args_is_help=True,
        context_settings={"max_content_width": 110},
    )

    @app.callback()
    def _group() -> None:
        pass

    _group.__doc__ = help_text
    return typer.main.get_command(app)


def _selector_command(method: str) -> Any:
    """One subcommand per selection method, with the method's own options beside the common ones."""
    from modelwright.catalog import load
    from modelwright.verbs import load_verb

    selector = load("selectors", method)
    return build_command(
        load_verb("select"),
        fixed={"method": method},
        extra=selector,
        extra_field="options",
        help_text=inspect.getdoc(selector) or "",
    )


def _select_group() -> Any:
    from modelwright.catalog import provided

    methods = {method: partial(_selector_command, method) for method in provided("selectors")}
    return _lazy_group("select", "Choose training data from a pool: one subcommand per method.", methods)


def _verb_command(name: str) -> Any:
    from modelwright.verbs import load_verb

    return build_command(load_verb(name))


def _commands() -> dict[str, Callable[[], Any]]:
    """Returns a builder for each name that may follow ``modelwright``."""
    from modelwright.verbs import VERBS

    commands: dict[str, Callable[[], Any]] = {}
    for name in VERBS:
        group, _, member = name.partition(" ")
        if name == "select":
            commands[name] = _select_group
        elif member:
            members = {v.split()[1]: partial(_verb_command, v) for v in VERBS if v.startswith(group + " ")}
            commands[group] = partial(_lazy_group, group, "Measure a model.", members)
        else:
            commands[name] = partial(_verb_command, name)
    commands.update({name: partial(_plain_command, target) for name, target in _PLAIN.items()})
    return commands


_HELP = """Published methods for language models, on your own Hugging Face model and data.

Start with: modelwright run quickstart. Each command below explains itself with --help."""


def run_command_line() -> None:
    """Reads the arguments and runs the command they name."""
    _lazy_group("modelwright", _HELP, _commands())(prog_name="modelwright")
