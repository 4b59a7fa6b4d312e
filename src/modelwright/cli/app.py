"""The root command. Verbs are loaded only when they are named or listed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup

from modelwright.cli.from_verb import build_command

#: Commands that are not verbs: they look at the project and do no work on anyone's data.
_PLAIN: dict[str, str] = {
    "list": "modelwright.cli.list_methods:ListMethods",
    "show": "modelwright.cli.show_method:ShowMethod",
    "doctor": "modelwright.cli.doctor:Doctor",
}


#: First words that do nothing by themselves, and what they are for.
_GROUPS = {
    "select": "Choose training data from a pool: one subcommand per method.",
    "heads": "Find attention heads by what they do.",
    "probe": "Look at what a model has learned: by token frequency, and by heart.",
    "prune": "Make a model smaller by taking parts out.",
    "sweep": "Train the same model over a range of one setting.",
    "tokenize": "Train tokenizers.",
    "speculate": "Speed up sampling with draft models.",
}


class Entry(NamedTuple):
    """A command that is not built until it is asked for.

    Attributes:
        build: Returns the command.
        text: Returns its help, of which a list of commands shows the first sentence.
    """

    build: Callable[[], Any]
    text: Callable[[], str]


def _plain_class(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def _of_class(load: Callable[[], Any]) -> Entry:
    return Entry(lambda: build_command(load()), lambda: inspect.getdoc(load()) or "")


def _first_sentence(entry: Entry) -> str:
    return " ".join(entry.text().split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def _lazy_group(name: str, help_text: str, commands: Mapping[str, Entry]) -> Any:
    """Returns a group whose commands are built when they are asked for.

    A command may have two words where the first is a command too: ``train contrastive`` beside ``train``.
    """

    class LazyGroup(TyperGroup):
        def format_commands(self, ctx: Any, formatter: Any) -> None:
            # The inherited one builds every command with all its options, to show one line of each.
            with formatter.section("Commands"):
                formatter.write_dl([(n, _first_sentence(entry)) for n, entry in commands.items() if " " not in n])

        def list_commands(self, ctx: Any) -> list[str]:
            return [name for name in commands if " " not in name]

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in commands:
                return None
            command = commands[cmd_name].build()
            command.name = cmd_name
            if longer := [other for other in commands if other.startswith(cmd_name + " ")]:
                command.also = tuple((other, _first_sentence(commands[other])) for other in longer)
            return command

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            from modelwright.errors import did_you_mean

            seconds = [other.split()[1] for other in commands if args and other.startswith(args[0] + " ")]
            if seconds and args[1:] and not args[1].startswith("-"):
                if args[1] not in seconds:
                    ctx.fail(f"There is no '{args[0]} {args[1]}': {did_you_mean(args[1], seconds)}")
                args = [f"{args[0]} {args[1]}", *args[2:]]
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


def _selector_text(method: str) -> str:
    from modelwright.catalog import load

    return inspect.getdoc(load("selectors", method)) or ""


def _commands() -> dict[str, Entry]:
    """Returns what may follow ``modelwright``."""
    from modelwright.catalog import provided
    from modelwright.verbs import VERBS, load_verb

    def group(name: str, text: str, members: Callable[[], Mapping[str, Entry]]) -> Entry:
        return Entry(lambda: _lazy_group(name, text, members()), lambda: text)

    def selectors() -> dict[str, Entry]:
        return {m: Entry(partial(_selector_command, m), partial(_selector_text, m)) for m in provided("selectors")}

    def members(of: str) -> dict[str, Entry]:
        own = {v.split()[1]: _of_class(partial(load_verb, v)) for v in VERBS if v.startswith(of + " ")}
        return selectors() | own if of == "select" else own

    commands: dict[str, Entry] = {}
    for name in VERBS:
        first = name.split()[0]
        if first in _GROUPS:
            commands[first] = group(first, _GROUPS[first], partial(members, first))
        else:
            commands[name] = _of_class(partial(load_verb, name))
    commands.update({name: _of_class(partial(_plain_class, target)) for name, target in _PLAIN.items()})
    return commands


_HELP = """Published methods for language models, on your own Hugging Face model and data.

Start with: modelwright run quickstart. Each command below explains itself with --help."""


def run_command_line() -> None:
    """Reads the arguments and runs the command they name."""
    _lazy_group("modelwright", _HELP, _commands())(prog_name="modelwright")
