"""The catalog of methods: reads every ``card.toml`` and imports nothing heavy.

A method is a folder with a ``card.toml``; no list names it. Folders are found below this package's wings and below
every package that an entry point of the group ``modelwright.methods`` names, so a third party adds a method
without touching this project.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from modelwright.errors import UserError, did_you_mean

STATUSES = ("stable", "experimental", "negative result", "baseline")
#: Wings in the order of a model's life, which is the order of `modelwright list`.
STAGES = (
    "curation",
    "synthesis",
    "tokenization",
    "architectures",
    "attention",
    "training",
    "alignment",
    "compression",
    "editing",
    "decoding",
    "steering",
    "probing",
    "evaluation",
)


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number that the paper reports.

    Attributes:
        claim: What is measured.
        setting: Model, data and sizes.
        method: The method's value, as printed.
        baseline: The baseline's value and name, as printed.
    """

    claim: str
    setting: str
    method: str
    baseline: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader wants to know of a method before using it.

    Attributes:
        name: The paper's name for it, lower case with hyphens.
        aliases: Further names that lead here, such as a variant in the same folder.
        title: The paper's title.
        paper: Where it is published, with year and version.
        status: One of :data:`STATUSES`.
        summary: One line for `modelwright list`.
        what_for: What it is for.
        when_not: When not to use it.
        python: A short example that runs.
        command: The command, or an empty string.
        numbers: What the paper reports.
        provides: Kind of part (``selectors``, ``architectures`` …) to its names and their ``module:attribute``.
        package: The folder as a dotted name.
        folder: The folder.
    """

    name: str
    title: str
    paper: str
    status: str
    summary: str
    what_for: str
    when_not: str
    python: str
    command: str = ""
    aliases: tuple[str, ...] = ()
    numbers: tuple[Number, ...] = ()
    provides: dict[str, dict[str, str]] = field(default_factory=dict)
    package: str
    folder: Path

    @property
    def stage(self) -> str:
        """The wing it stands in, such as ``curation``."""
        return self.package.rsplit(".", 2)[-2]

    @property
    def has_claim(self) -> bool:
        """Whether `modelwright verify` can run an experiment for it."""
        return (self.folder / "claim.py").is_file()


def _roots() -> Iterator[tuple[str, Path]]:
    yield "modelwright", Path(__file__).parent
    for point in entry_points(group="modelwright.methods"):
        # find_spec of a top-level package does not import it.
        spec = importlib.util.find_spec(point.value.split(":")[0])
        for location in (spec.submodule_search_locations or []) if spec else []:
            yield point.value, Path(location)


def _read(path: Path, package: str) -> Card:
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        numbers = tuple(Number(**n) for n in raw.pop("numbers", []))
        aliases = tuple(raw.pop("aliases", []))
        card = Card(**raw, numbers=numbers, aliases=aliases, package=package, folder=path.parent)
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise UserError(f"{path} is not a valid method card: {error}.") from error
    if card.status not in STATUSES:
        raise UserError(f"{path}: status {card.status!r} is not one of {', '.join(STATUSES)}.")
    return card


@functools.cache
def cards() -> dict[str, Card]:
    """Returns every method's card by name, in the order of the stages and then by name.

    Raises:
        UserError: A card is malformed, or two claim one name.
    """
    found: list[Card] = []
    for package, root in _roots():
        for path in sorted(root.glob("*/*/card.toml")):
            found.append(_read(path, f"{package}.{path.parent.parent.name}.{path.parent.name}"))
    stage_order = {stage: i for i, stage in enumerate(STAGES)}
    found.sort(key=lambda c: (stage_order.get(c.stage, len(STAGES)), c.status == "baseline", c.name))
    taken: dict[str, Card] = {}
    for card in found:
        for name in (card.name, *card.aliases):
            if name in taken:
                raise UserError(f"Two method cards use the name '{name}': {taken[name].folder} and {card.folder}.")
            taken[name] = card
    return {card.name: card for card in found}


def find(name: str) -> Card:
    """Returns the card of a method by its name or an alias; ``_`` and upper case are forgiven.

    Raises:
        UserError: No such method.
    """
    wanted = name.lower().replace("_", "-")
    names = {n: card for card in cards().values() for n in (card.name, *card.aliases)}
    if wanted not in names:
        raise UserError(f"There is no method called '{name}': {did_you_mean(wanted, names)}")
    return names[wanted]


def provided(kind: str) -> dict[str, str]:
    """Returns every part of a kind: its name to its ``module:attribute``."""
    return {name: target for card in cards().values() for name, target in card.provides.get(kind, {}).items()}


def load(kind: str, name: str) -> Any:
    """Imports and returns a part, such as ``load("selectors", "zip-fit")``.

    Raises:
        UserError: No such part.
    """
    parts = provided(kind)
    wanted = name.lower().replace("_", "-")
    if wanted not in parts:
        raise UserError(f"There is no '{name}' among the {kind}: {did_you_mean(wanted, parts)}")
    module, attribute = parts[wanted].split(":")
    return getattr(importlib.import_module(module), attribute)
