"""The text of a recipe as values that remember their lines, and the overrides of ``--set``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modelwright.errors import UserError, did_you_mean
from modelwright.values import Loader, parse_value

#: Where a value stands: keys and list indices from the top of the file.
Place = tuple[Any, ...]


@dataclass
class Source:
    """A recipe's text, its values and where each of them stands.

    Attributes:
        name: The file as messages name it.
        folder: The file's folder, absolute.
        text: The text as it was read.
        value: The values, with overrides applied.
        lines: Line (from 1) of every key and list item.
        overrides: Place to the ``--set`` that put the value there.
    """

    name: str
    folder: Path
    text: str
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    overrides: dict[Place, str] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """Returns ``recipe.yaml:12``, or the override that a value comes from."""
        for length in range(len(place), -1, -1):
            prefix = place[:length]
            if prefix in self.overrides:
                return f"--set {self.overrides[prefix]}"
            if prefix in self.lines:
                return f"{self.name}:{self.lines[prefix]}"
        return self.name

    def error(self, place: Place, problem: str) -> UserError:
        """Returns the error that names file, line, field and problem."""
        shown = ".".join(str(part) for part in place)
        return UserError(f"{self.where(place)}: {f'{shown}: ' if shown else ''}{problem}")


def read_source(name: str, folder: Path, text: str, overrides: Sequence[str] = ()) -> Source:
    """Parses YAML, keeping line numbers, and applies overrides.

    Raises:
        UserError: The YAML is malformed, a key stands twice, or an override names nothing.
    """
    source = Source(name, folder, text)
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        source.value = _construct(loader, node, (), source, ()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{name}{line}: this is not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name}: this is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(source.value, dict):
        raise UserError(f"{name}: a recipe is a mapping with the keys name and steps.")
    for override in overrides:
        _override(source, override)
    return source


def _construct(loader: Loader, node: yaml.Node, place: Place, source: Source, above: tuple[int, ...]) -> Any:
    if id(node) in above:
        raise UserError(f"{source.name}:{node.start_mark.line + 1}: this YAML alias contains itself.")
    above = (*above, id(node))
    source.lines.setdefault(place, node.start_mark.line + 1)
    if not isinstance(node, yaml.ScalarNode) and node.tag.rsplit(":", 1)[-1] not in ("map", "seq"):
        raise UserError(f"{source.name}:{node.start_mark.line + 1}: this is not valid YAML here: the tag {node.tag}.")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*place, i), source, above) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node, deep=True)
        except ValueError as error:
            raise source.error(place, f"{error}.") from error
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag.endswith(":merge"):
            continue
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise UserError(f"{source.name}:{line}: a key must be a plain word.")
        if key in seen:
            field_name = ".".join(map(str, (*place, key)))
            raise UserError(
                f"{source.name}:{line}: {field_name} stands twice, first in line {seen[key]}: remove one of them."
            )
        seen[key] = line
    loader.flatten_mapping(node)  # YAML's `<<: *anchor`; the keys given beside it win
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        source.lines[*place, key] = key_node.start_mark.line + 1
        found[key] = _construct(loader, value_node, (*place, key), source, above)
    return found


def _override(source: Source, override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys: list[Any] = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override!r} is not of the form path.to.key=value.")
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: {text!r} is not a valid YAML value.") from error
    inside = source.value
    for depth, key in enumerate(keys):
        shown = ".".join(map(str, keys[:depth]))
        if isinstance(inside, list):
            if not key.isdigit() or int(key) >= len(inside):
                raise UserError(f"--set {override}: {shown} is a list of {len(inside)}; {key!r} is not an index of it.")
            keys[depth] = key = int(key)
        elif not isinstance(inside, dict):
            raise UserError(f"--set {override}: {shown} is a plain value, so there is no {key!r} in it.")
        elif depth == 1 and keys[0] == "steps" and key not in inside:
            raise UserError(f"--set {override}: there is no step '{key}': {did_you_mean(key, map(str, inside))}")
        if depth == len(keys) - 1:
            inside[key] = value
        else:
            # A key that the file leaves out is made; if the schema has no such key, checking the recipe says so.
            inside = inside[key] if isinstance(inside, list) else inside.setdefault(key, {})
    source.overrides[tuple(keys)] = override
