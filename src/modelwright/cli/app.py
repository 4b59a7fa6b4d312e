"""The root command. Verbs are loaded only when they are named or listed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import typer
from typer.core import TyperGroup

from modelwright import __version__
from modelwright.cli.from_verb import build_command
from modelwright.cli.guard import guarded

#: Commands that are not verbs: they look at the project and do no work on anyone's data.
_PLAIN: dict[str, str] = {
    "list": "modelwright.cli.list_methods:list_methods",
    "show": "modelwright.cli.show_method:show_method",
    "doctor": "modelwright.cli.doctor:doctor",
}


def _import(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def _plain_command(target: str) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(guarded(_import(target)))
    return typer.main.get_command(app)


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
        cls=LazyGroup, name=name, help=help_text, add_completion=False, rich_markup_mode=None, no_args_is_help=True
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

    return build_command(
        load_verb("select"), fixed={"method": method}, extra=load("selectors", method), extra_field="options"
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


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 a defect of ours, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        sys.stdout.write(f"modelwright {__version__}\n")
        return
    command = _lazy_group("modelwright", _HELP, _commands())
    command(prog_name="modelwright")
