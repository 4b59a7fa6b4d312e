"""From a recipe to the single pieces of work, each with its id, its key and what it waits for."""

from __future__ import annotations

import graphlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelwright.errors import UserError, did_you_mean
from modelwright.recipes import pick
from modelwright.recipes.inputs import Inputs
from modelwright.recipes.load import Loaded
from modelwright.recipes.matrix import Point, constant, label, matrix_value, points
from modelwright.recipes.options import REQUIRED, Option, OptionProblem, options_of
from modelwright.recipes.references import Reference, ReferenceProblem, dig, references, substitute
from modelwright.recipes.schema import Step
from modelwright.recipes.source import Place
from modelwright.recipes.store import Store, key_of

#: Says what a reference to one instance stands for; the place is for errors.
ValueOf = Callable[["Instance", Reference, Place], Any]


@dataclass(eq=False)
class Instance:
    """One step at one point of its matrix.

    Attributes:
        step: The step's name.
        verb: Its verb.
        point: Its matrix coordinates.
        options: Its options as the recipe has them, references included.
        outputs: Output option to file name in the step's folder.
        needs: Instances whose results it uses.
        key: Key of its result; equal keys share one result.
        candidates: For ``pick``: the instances to choose among.
    """

    step: str
    verb: str
    point: Point
    options: dict[str, Any]
    outputs: dict[str, str] = field(default_factory=dict)
    needs: list[Instance] = field(default_factory=list)
    key: str = ""
    candidates: list[Instance] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Such as ``train[method=zip-fit,seed=0]``."""
        at = ",".join(f"{d}={label(v)}" for d, v in sorted(self.point.at.items()))
        return f"{self.step}[{at}]" if at else self.step

    @property
    def output(self) -> str:
        """File name of what ``${step.output}`` means, or an empty string."""
        return self.outputs.get("output") or next(iter(self.outputs.values()), "")


class Plan:
    """All instances of a recipe in an order in which they can be run.

    Args:
        loaded: The recipe.
        run: The run's folder; nothing is written to it.

    Raises:
        UserError: References do not fit together, an option has a wrong type, or a file is missing.
    """

    def __init__(self, loaded: Loaded, run: Path) -> None:
        self.recipe, self.source = loaded.recipe, loaded.source
        self.store = Store(run)
        self.inputs = Inputs(self.store.folder / ".inputs.json")
        self.constants = {"seeds": self.recipe.seeds, "recipe": {"folder": str(self.source.folder)}}
        self.by_step: dict[str, list[Instance]] = {}
        for name in self._order():
            self._expand(name, self.recipe.steps[name])
            for instance in self.by_step[name]:
                self._identify(instance)

    @property
    def instances(self) -> list[Instance]:
        """All instances, each after what it needs."""
        return [instance for found in self.by_step.values() for instance in found]

    def values(self, instance: Instance, results: dict[str, Any]) -> dict[str, Any]:
        """Returns an instance's options with every reference resolved.

        Args:
            instance: The instance.
            results: Key to result, for everything that the instance needs.

        Raises:
            UserError: A result has no such entry.
        """

        def value_of(target: Instance, reference: Reference, place: Place) -> Any:
            if reference.path[0] == "output":
                return str(self.store.step(target.key) / target.output)
            try:
                return self.store.absolute(dig(results[target.key], reference.path[1:]))
            except KeyError as error:
                key, known = error.args
                problem = (
                    f"{reference}: the result of '{target.id}' has no '{key}': {did_you_mean(key, map(str, known))}"
                )
                raise ReferenceProblem(place, problem) from error

        try:
            if instance.verb == "pick":
                return self._pick(instance, value_of)
            return self._resolve(instance.options, instance.point, value_of, ())
        except ReferenceProblem as problem:
            raise self._error(instance, problem) from problem

    def _pick(self, instance: Instance, value_of: ValueOf) -> dict[str, Any]:
        reference = next(references(instance.options["from"]))[1]
        numbers = [value_of(c, reference, ("from",)) for c in instance.candidates]
        try:
            found = pick.choose(
                numbers, [c.point.at for c in instance.candidates], instance.options.get("prefer", "lowest")
            )
        except UserError as error:
            raise ReferenceProblem(("from",), str(error)) from error
        best = instance.candidates[found.pop("index")]
        point = instance.point.joined(best.point)
        return {"value": self._resolve(instance.options["value"], point, value_of, ("value",)), **found}

    def _error(self, instance: Instance, problem: ReferenceProblem | OptionProblem) -> UserError:
        return self.source.error(("steps", instance.step, "with", *problem.place), problem.problem)

    def _order(self) -> list[str]:
        graph: dict[str, set[str]] = {}
        for name, step in self.recipe.steps.items():
            graph[name] = set()
            try:
                for place, reference in references(step.with_):
                    self._check_reference(reference, place, step)
                    if reference.root in self.recipe.steps:
                        graph[name].add(reference.root)
            except ReferenceProblem as problem:
                raise self.source.error(("steps", name, "with", *problem.place), problem.problem) from problem
        try:
            return list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            cycle = [str(name) for name in reversed(error.args[1])]
            if len(cycle) == 2:
                raise self.source.error(("steps", cycle[0]), "this step refers to its own result.") from error
            chain = " needs ".join(f"'{name}'" for name in cycle)
            raise self.source.error(("steps", cycle[0]), f"the steps go in a circle: {chain}.") from error

    def _check_reference(self, reference: Reference, place: Place, step: Step) -> None:
        if reference.root in self.constants:
            constant(reference, place, self.constants)
        elif reference.root == "matrix":
            if not reference.path:
                raise ReferenceProblem(place, f"{reference} lacks the dimension: write ${{matrix.NAME}}.")
        elif reference.root not in self.recipe.steps:
            known = [*self.recipe.steps, "matrix", *self.constants]
            raise ReferenceProblem(place, f"{reference} names no step: {did_you_mean(reference.root, known)}")
        elif not reference.path or reference.path[0] not in ("output", "result"):
            after = reference.path[0] if reference.path else ""
            hint = did_you_mean(after, ["output", "result"])
            raise ReferenceProblem(
                place, f"{reference}: after a step's name comes 'output' or 'result', not '{after}': {hint}"
            )
        elif reference.path[0] == "output" and len(reference.path) > 1:
            raise ReferenceProblem(
                place, f"{reference}: 'output' is a path; write ${{{reference.root}.output}}/NAME for a file in it."
            )

    def _expand(self, name: str, step: Step) -> None:
        try:
            found = points(step.matrix, step.exclude, self.constants)
        except ReferenceProblem as problem:
            raise self.source.error(("steps", name, *problem.place), problem.problem) from problem
        outputs = {o.name: o.filename for o in _options(step.uses).values() if o.kind == "output" and o.filename}
        self.by_step[name] = [Instance(name, step.uses, point, step.with_, outputs) for point in found]

    def _targets(self, reference: Reference, point: Point, place: Place) -> Instance | list[Instance]:
        """Returns the instance at the same coordinates, or a list over the dimensions that ``point`` does not have."""
        every = self.by_step[reference.root]
        found = [candidate for candidate in every if candidate.point.meets(point)]
        if not found:
            shared = {d: v for d, v in point.at.items() if d in every[0].point.at}
            at = ", ".join(f"{d}={label(v)}" for d, v in shared.items())
            problem = (
                f"{reference}: the step '{reference.root}' has nothing at {at} (it is excluded, or not in its matrix)."
            )
            raise ReferenceProblem(place, problem)
        return found if every[0].point.at.keys() - point.at.keys() else found[0]

    def _resolve(self, template: Any, point: Point, value_of: ValueOf, place: Place) -> Any:
        def lookup(reference: Reference, place: Place) -> Any:
            if reference.root in self.constants:
                return constant(reference, place, self.constants)
            if reference.root == "matrix":
                return matrix_value(reference, place, point)
            if reference.path[0] == "output" and not self.by_step[reference.root][0].output:
                raise ReferenceProblem(place, f"{reference}: '{reference.root}' writes no output; use its result.")
            targets = self._targets(reference, point, place)
            if isinstance(targets, list):
                return [value_of(target, reference, place) for target in targets]
            return value_of(targets, reference, place)

        return substitute(template, lookup, place)

    def _identify(self, instance: Instance) -> None:
        """Finds what an instance needs and its key, and checks its options as far as they are known before the run."""
        needs: dict[str, Instance] = {}

        def value_of(target: Instance, reference: Reference, place: Place) -> Any:
            needs[target.id] = target
            if reference.path[0] == "output":
                return f"store/{target.key}/{target.output}"
            return f"{target.key}.{'.'.join(reference.path)}"

        try:
            if instance.verb == "pick":
                identity = self._identify_pick(instance, value_of)
            else:
                resolved = self._resolve(instance.options, instance.point, value_of, ())
                identity = self._identity(instance, resolved)
        except (ReferenceProblem, OptionProblem) as problem:
            raise self._error(instance, problem) from problem
        instance.needs = list(needs.values())
        instance.key = key_of(instance.verb, identity)

    def _identify_pick(self, instance: Instance, value_of: ValueOf) -> dict[str, Any]:
        given = instance.options["from"]
        inside = [reference for _, reference in references(given)]
        if len(inside) != 1 or str(inside[0]) != given or inside[0].root not in self.recipe.steps:
            raise ReferenceProblem(
                ("from",), "this must be one reference to a number, such as ${evaluate.result.bits_per_byte}."
            )
        prefer = instance.options.get("prefer", "lowest")
        if prefer not in pick.PREFER:
            raise ReferenceProblem(("prefer",), f"it is {prefer!r}: {did_you_mean(str(prefer), pick.PREFER)}")
        targets = self._targets(inside[0], instance.point, ("from",))
        instance.candidates = targets if isinstance(targets, list) else [targets]
        numbers = [value_of(c, inside[0], ("from",)) for c in instance.candidates]
        values = [
            self._resolve(instance.options["value"], instance.point.joined(c.point), value_of, ("value",))
            for c in instance.candidates
        ]
        at = [sorted(c.point.at.items()) for c in instance.candidates]
        return {"from": numbers, "value": values, "prefer": prefer, "at": at}

    def _identity(self, instance: Instance, resolved: dict[str, Any]) -> dict[str, Any]:
        identity: dict[str, Any] = {}
        for name, option in _options(instance.verb).items():
            if option.kind == "output":
                continue
            if name not in resolved:
                if option.kind != "run":
                    identity[name] = None if option.default is REQUIRED else option.default
                continue
            unknown = any(
                r.path[:1] == ("result",) for _, r in references(instance.options[name]) if r.root in self.by_step
            )
            value = resolved[name] if unknown else option.convert(resolved[name])
            if option.kind == "input":
                value = self._input_identity(value, (name,))
            if option.kind == "methods" and not unknown:
                value = self._methods_identity(value, (name,))
            if option.kind != "run":
                identity[name] = value
        return identity

    def _methods_identity(self, value: Any, place: Place) -> Any:
        from modelwright.decoding.parts import read_parts

        try:
            return read_parts(value).identity()
        except UserError as error:
            raise ReferenceProblem(place, str(error)) from error

    def _input_identity(self, value: Any, place: Place) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._input_identity(item, (*place, i)) for i, item in enumerate(value)]
        text = str(value)
        if value is None or any(text.startswith((f"store/{i.key}", f"{i.key}.")) for i in self.instances if i.key):
            return value
        try:
            return self.inputs.identity(text)
        except UserError as error:
            raise ReferenceProblem(place, str(error)) from error


def _options(verb: str) -> dict[str, Option]:
    from modelwright.verbs import load_verb

    return {} if verb == "pick" else options_of(load_verb(verb))
