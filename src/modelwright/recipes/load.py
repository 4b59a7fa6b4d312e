"""From a name or a path to a recipe that has been checked, every error with its file, line and field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from modelwright.errors import UserError, did_you_mean
from modelwright.recipes import pick
from modelwright.recipes.options import REQUIRED, options_of
from modelwright.recipes.references import RESERVED
from modelwright.recipes.schema import Recipe, Step
from modelwright.recipes.source import Place, Source, read_source

_BUNDLED = Path(__file__).parent / "bundled"
#: Verbs that make no sense as a step.
_NOT_STEPS = ("run", "report")


@dataclass
class Loaded:
    """A checked recipe and the text it came from."""

    recipe: Recipe
    source: Source


def bundled() -> dict[str, Path]:
    """Returns the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_BUNDLED.glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Returns the file of a recipe given by path, or by name if it is bundled.

    Raises:
        UserError: There is no such file or name.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if recipe in bundled():
        return bundled()[recipe]
    if path.is_dir():
        raise UserError(f"{recipe} is a folder: give the recipe's YAML file.")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"The recipe {recipe} does not exist.")
    raise UserError(
        f"There is no recipe called '{recipe}': {did_you_mean(recipe, bundled())} "
        "Or give the path of a YAML file of your own."
    )


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Loaded:
    """Reads and checks a recipe.

    Args:
        recipe: Path of a YAML file, or the name of a bundled recipe.
        overrides: ``--set`` assignments such as ``steps.train.with.max_steps=50``; values are YAML.

    Raises:
        UserError: Anything is wrong; the message names file, line and field.
    """
    path = find_recipe(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read: {error}.") from error
    source = read_source(path.name if path.parent == _BUNDLED else str(path), path.parent.resolve(), text, overrides)
    try:
        checked = Recipe.model_validate(source.value)
    except ValidationError as error:
        raise _schema_error(source, error, Recipe) from error
    for name, step in checked.steps.items():
        _check_step(source, name, step)
    _check_report(source, checked)
    return Loaded(checked, source)


def _schema_error(source: Source, error: ValidationError, model: type[BaseModel], inside: Place = ()) -> UserError:
    # The first in the file is the one to mend first; a wrong key before the key that is missing because of it.
    def order(found: Any) -> tuple[bool, int]:
        return found["type"] == "missing", source.lines.get((*inside, *found["loc"]), 0)

    first = min(error.errors(), key=order)
    place = (*inside, *(part for part in first["loc"] if part != "[key]"))
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1])
        return source.error(place, f"there is no such key here: {did_you_mean(str(place[-1]), known)}")
    if first["type"] == "missing":
        return source.error(place[:-1], f"the key '{place[-1]}' is missing.")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return source.error(place, f"{message}, but it is {first['input']!r:.80}.")


def _keys_at(model: Any, loc: tuple[Any, ...]) -> list[str]:
    """Returns the keys that a schema knows at a place, following models, lists and mappings."""
    import typing

    hint: Any = model
    for part in loc:
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            fields = {field.alias or name: field for name, field in hint.model_fields.items()}
            hint = fields[part].annotation if part in fields else None
        else:
            hint = (typing.get_args(hint) or (None,))[-1]
        # `X | None`
        options = [o for o in typing.get_args(hint) if isinstance(o, type) and issubclass(o, BaseModel)]
        if options and typing.get_origin(hint) not in (list, dict, tuple):
            hint = options[0]
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [field.alias or name for name, field in hint.model_fields.items()]
    return []


def _check_step(source: Source, name: str, step: Step) -> None:
    from modelwright.verbs import VERBS, load_verb

    here: Place = ("steps", name)
    if name in RESERVED or not name.replace("_", "").replace("-", "").isalnum():
        raise source.error(
            here, "a step's name is made of letters, digits, - and _, and is not " + ", ".join(RESERVED) + "."
        )
    usable = {verb: target for verb, target in VERBS.items() if verb not in _NOT_STEPS}
    if step.uses == "pick":
        known, required = list(pick.OPTIONS), list(pick.REQUIRED)
    elif step.uses in usable:
        options = options_of(load_verb(step.uses))
        outputs = [o.name for o in options.values() if o.kind == "output"]
        for given in step.with_:
            if given in outputs:
                raise source.error(
                    (*here, "with", given), "a recipe decides itself where outputs go: remove this line."
                )
        known = [name for name in options if name not in outputs]
        required = [name for name in known if options[name].default is REQUIRED]
    else:
        why = "cannot be a step" if step.uses in VERBS else "does not exist"
        raise source.error(
            (*here, "uses"), f"the verb '{step.uses}' {why}: {did_you_mean(step.uses, [*usable, 'pick'])}"
        )
    for given in step.with_:
        if given not in known:
            raise source.error(
                (*here, "with", given), f"'{step.uses}' has no such option: {did_you_mean(str(given), known)}"
            )
    for missing in required:
        if missing not in step.with_:
            place = (*here, "with") if step.with_ else here
            raise source.error(place, f"'{step.uses}' needs the option '{missing}'.")


def _check_report(source: Source, recipe: Recipe) -> None:
    try:
        from modelwright.report.spec import ReportSpec
    except ImportError:  # a slim installation without the report
        return
    try:
        ReportSpec.model_validate(recipe.report)
    except ValidationError as error:
        raise _schema_error(source, error, ReportSpec, ("report",)) from error
    # A wrong name here would otherwise show only after the whole run.
    for name, value in recipe.report.items():
        for i, block in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(block, dict):
                place = ("report", name, i) if isinstance(value, list) else ("report", name)
                _check_block(source, recipe, place, block)


def _check_block(source: Source, recipe: Recipe, place: Place, block: dict[str, Any]) -> None:
    key = "metric" if "metric" in block else "step"
    if not isinstance(block.get(key), str):
        return
    step = block[key].split(".")[0]
    if step not in recipe.steps:
        raise source.error((*place, key), f"there is no step '{step}': {did_you_mean(step, recipe.steps)}")
    dimensions = recipe.steps[step].matrix
    for option in ("rows", "columns", "over", "lines"):
        given = block.get(option) or []
        for dimension in given if isinstance(given, list) else [given]:
            if dimension not in dimensions:
                hint = did_you_mean(str(dimension), dimensions)
                raise source.error((*place, option), f"the step '{step}' has no dimension '{dimension}': {hint}")
