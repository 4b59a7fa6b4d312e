"""An edit: a change of a model that is put on, taken off to the last bit, saved and loaded.

The edits that are on a model form a stack. Of each weight that they touch the original is kept once, whatever the
number of edits; taking the topmost off puts the original back and repeats the additions of those below, so the result
has the very bits that were there before.
"""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from modelwright import catalog, files
from modelwright.editing.deltas import Delta, Dense, Replacement, from_tensors, join
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.requests import EditRequest
from modelwright.errors import DivergedError, UserError
from modelwright.models.roles import unwrap

_FORMAT = 2


@dataclass
class _Stack:
    """The edits on a model, lowest first, and the weights as they were before the first."""

    edits: list[Edit] = field(default_factory=list)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    handles: dict[int, list[RemovableHandle]] = field(default_factory=dict)
    base: str | None = None


_stacks: weakref.WeakKeyDictionary[nn.Module, _Stack] = weakref.WeakKeyDictionary()


def edits_on(model: nn.Module) -> list[Edit]:
    """Returns the edits that are on a model, lowest first."""
    stack = _stacks.get(unwrap(model))
    return list(stack.edits) if stack else []


def base_fingerprint(model: nn.Module) -> str:
    """Returns the fingerprint of the model below all edits that are on it; statistics of that model fit this one.

    A checkpoint that was saved with edits in it remembers that fingerprint in its config, as ``modelwright_base``, and
    its own as ``modelwright_edited``: once its weights are others, trained ones for example, it is a model of its own.
    """
    inner = unwrap(model)
    stack = _stacks.get(inner)
    if stack is None or not stack.edits:  # an edit that was refused leaves a stack without any
        return _recorded(inner, model_fingerprint(inner))
    if stack.base is None:
        stack.base = _recorded(inner, model_fingerprint(inner, instead=stack.originals.items()))
    return stack.base


def _recorded(model: nn.Module, found: str) -> str:
    config = getattr(model, "config", None)
    base, edited = (getattr(config, f"modelwright_{name}", None) for name in ("base", "edited"))
    return base if isinstance(base, str) and edited in (None, found) else found


@contextlib.contextmanager
def unedited(model: nn.Module) -> Iterator[None]:
    """Puts the original weights back inside the block; hooks of edits that change no weights stay."""
    stack = _stacks.get(unwrap(model)) or _Stack()
    parameters = dict(unwrap(model).named_parameters())
    now = {name: parameters[name].detach().clone() for name in stack.originals}
    try:
        _write(parameters, stack.originals)
        yield
    finally:
        _write(parameters, now)


@torch.no_grad()
def _write(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


class Edit(ABC):
    """A change of one model.

    Attributes:
        method: Name of the editor that made it.
        fingerprint: Of the model that it was fitted on, as :func:`~modelwright.editing.fingerprint.model_fingerprint`
            gives it with every value of ``touched``; None fits every model (edits that only change the prompt).
        touched: Names of the weights that the fingerprint has whole.
        requests: What it is for.
        details: What the editor found on the way, JSON-able: losses, layers, norms.
        changes_weights: Whether the model's weights are other ones while it is on.
        reads_rows: Whether what it does at a token depends on the text behind it too, in the same call: whoever scores
            an answer must then give the prompt first, in a call of its own and with a cache.
        kind: Name under which :func:`load_edit` finds the class, as a card's ``[provides.edits]`` gives it.
    """

    changes_weights: ClassVar[bool] = False
    reads_rows: bool = False
    kind: ClassVar[str]
    touched: tuple[str, ...] = ()

    def __init__(
        self,
        method: str,
        fingerprint: str | None,
        requests: Sequence[EditRequest] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.method = method
        self.fingerprint = fingerprint
        self.requests = tuple(requests)
        self.details = dict(details or {})

    @abstractmethod
    def _put_on(self, model: nn.Module, stack: _Stack) -> None:
        """Changes the unwrapped model; everything is checked before anything is changed."""

    @abstractmethod
    def _take_off(self, model: nn.Module, stack: _Stack) -> None:
        """Undoes :meth:`_put_on`; the edit is the topmost, and is still on the stack."""

    @abstractmethod
    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns what a saved edit needs beside the common fields: JSON, and tensors by name."""

    @classmethod
    @abstractmethod
    def _from_state(cls, common: dict[str, Any], state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        """Makes an edit of what was saved; ``common`` are the arguments of :class:`Edit`."""

    def _read(self, folder: Path) -> None:  # noqa: B027
        """Reads what an overridden :meth:`write` has laid beside the common files."""

    def prompt(self, question: str) -> str:
        """Returns what to ask the model instead of a question: the same, unless the edit lives in the prompt."""
        return question

    def holds(self, other: Edit) -> bool:
        """Whether this edit alone does what it does with another below it: it was fitted on that and took it in.

        Edits that hold themselves are of the kind that takes in what came before.
        """
        return False

    def found_on(self, model: nn.Module) -> str:
        """Returns the fingerprint that a model has now; this edit's own, if it fits."""
        return model_fingerprint(model, whole=self.touched)

    def apply_(self, model: nn.Module) -> None:
        """Puts the edit on a model, in place.

        Raises:
            UserError: It is on already, or the model is not the one that it was fitted on.
        """
        inner = unwrap(model)
        stack = _stacks.setdefault(inner, _Stack())
        if any(edit is self for edit in stack.edits):
            raise UserError(f"This {self.method} edit is on the model already: it can be put on once.")
        if self.fingerprint is not None and (found := self.found_on(inner)) != self.fingerprint:
            raise UserError(
                f"The {self.method} edit was fitted on a model with fingerprint {self.fingerprint}, and this one has "
                f"{found}: it is another model, has edits that the fit did not see, or holds this edit already."
            )
        self._put_on(inner, stack)
        stack.edits.append(self)

    def revert_(self, model: nn.Module) -> None:
        """Takes the edit off: the weights have the bits that they had before.

        Raises:
            UserError: It is not on this model, or others were put on after it.
        """
        inner = unwrap(model)
        stack = _stacks.get(inner)
        if stack is None or not any(edit is self for edit in stack.edits):
            raise UserError(f"This {self.method} edit is not on the model, so it cannot be taken off.")
        if stack.edits[-1] is not self:
            raise UserError(
                f"{len(stack.edits) - 1 - stack.edits.index(self)} edits were put on after this {self.method} edit: "
                f"take those off first, the last one first."
            )
        self._take_off(inner, stack)
        stack.edits.pop()
        if not stack.edits:
            del _stacks[inner]

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Has the edit on the model inside the block."""
        self.apply_(model)
        try:
            yield model
        finally:
            self.revert_(model)

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Writes a folder (JSON and safetensors) that appears whole or not at all.

        Raises:
            UserError: It exists and ``force`` is off, or the disk is full.
        """
        with files.atomic_path(folder, force) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Writes the edit into a new folder that the caller keeps or throws away as a whole.

        Raises:
            UserError: It could not be read again, because no card offers its kind.
        """
        from safetensors.torch import save_file

        if self.kind != WeightEdit.kind and self.kind not in catalog.provided("edits"):
            raise UserError(
                f"A {self.method} edit cannot be saved: no method's card offers edits of the kind '{self.kind}' "
                f"([provides.edits]), so it could not be read again."
            )
        state, tensors = self._state()
        folder.mkdir(parents=True)
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / "edit.safetensors")
        common = {
            "format": _FORMAT,
            "kind": self.kind,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "requests": [request.to_dict() for request in self.requests],
            "details": self.details,
        }
        files.write_json(folder / "edit.json", {**common, "state": state})


def load_edit(folder: str | Path) -> Edit:
    """Reads an edit that :meth:`Edit.save` wrote; no code but this toolkit's is run.

    Raises:
        UserError: The folder holds none, or a damaged one, or one of an unknown kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "edit.json").is_file():
        raise UserError(f"{folder} holds no edit (no edit.json): give a folder that an edit was saved to.")
    raw = files.read_json(folder / "edit.json")
    if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
        raise UserError(f"{folder / 'edit.json'} is not an edit of format {_FORMAT}, the only one known here.")
    try:
        tensors = load_file(folder / "edit.safetensors")
        kind = raw["kind"]
        cls = WeightEdit if kind == WeightEdit.kind else catalog.load("edits", kind)
        common = {
            "method": raw["method"],
            "fingerprint": raw["fingerprint"],
            "requests": [EditRequest.from_dict(row) for row in raw["requests"]],
            "details": raw["details"],
        }
        edit: Edit = cls._from_state(common, raw["state"], tensors)
        edit._read(folder)
        return edit
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The edit in {folder} is damaged ({reason}): fit it again, or copy it again.") from error


@torch.no_grad()
def revert_all(model: nn.Module, keep: int = 0) -> None:
    """Takes edits off a model, the last one first; the weights have the bits that they had before.

    Weights are written once, however many edits there are: a thousand one by one would be half a million additions.

    Args:
        model: The model.
        keep: How many of the edits stay, the lowest ones.
    """
    inner = unwrap(model)
    stack = _stacks.get(inner)
    if stack is None:
        return
    names: dict[str, None] = {}
    while len(stack.edits) > keep:
        edit = stack.edits[-1]
        if isinstance(edit, WeightEdit):
            names |= dict.fromkeys(edit.deltas)
        else:
            edit._take_off(inner, stack)
        stack.edits.pop()
    _rewrite(inner, stack, names, stack.edits)
    if not stack.edits:
        del _stacks[inner]


@torch.no_grad()
def _rewrite(model: nn.Module, stack: _Stack, names: Iterable[str], edits: Sequence[Edit]) -> None:
    """Gives weights the values that they have with some edits on the model."""
    parameters = dict(model.named_parameters())
    left = [edit for edit in edits if isinstance(edit, WeightEdit)]
    for name in names:
        value, touched = stack.originals[name], False
        for edit in left:
            if name in edit.deltas:
                value, touched = edit.deltas[name].added_to(value), True
        parameters[name].copy_(value)
        if not touched:
            del stack.originals[name]


class WeightEdit(Edit):
    """An edit that adds to weights.

    Attributes:
        deltas: Parameter name, as in the unwrapped model's ``named_parameters``, to what is added.
    """

    changes_weights: ClassVar[bool] = True
    kind: ClassVar[str] = "weights"

    def __init__(
        self,
        method: str,
        fingerprint: str | None,
        deltas: Mapping[str, Delta],
        requests: Sequence[EditRequest] = (),
        details: Mapping[str, Any] | None = None,
        touched: Sequence[str] | None = None,
    ) -> None:
        super().__init__(method, fingerprint, requests, details)
        self.deltas = dict(deltas)
        self.touched = tuple(self.deltas if touched is None else touched)
        for name, delta in self.deltas.items():
            if not delta.is_finite():
                raise DivergedError(
                    f"The {method} edit of '{name}' is not finite: the optimisation diverged or the statistics are "
                    f"singular (more text, a larger ridge or a smaller learning rate may help)."
                )

    @property
    def is_whole(self) -> bool:
        """Whether it adds to every number of a weight, so that it is as large as the weight."""
        return any(isinstance(delta, Dense) for delta in self.deltas.values())

    @property
    def is_folded(self) -> bool:
        """Whether it keeps what a weight becomes, as :func:`fold` makes it, and not what is added."""
        return any(isinstance(delta, Replacement) for delta in self.deltas.values())

    def holds(self, other: Edit) -> bool:
        """See :meth:`Edit.holds`; true of what :func:`fold` made."""
        kept = [name for name, delta in self.deltas.items() if isinstance(delta, Replacement)]
        return isinstance(other, WeightEdit) and set(other.deltas) <= set(kept)

    def norms(self) -> dict[str, float]:
        """Returns the Frobenius norm of what is added to each parameter."""
        return {name: delta.norm() for name, delta in self.deltas.items()}

    @torch.no_grad()
    def _put_on(self, model: nn.Module, stack: _Stack) -> None:
        parameters = dict(model.named_parameters())
        for name, delta in self.deltas.items():
            check_editable(model, name)
            if delta.shape != parameters[name].shape:
                raise UserError(
                    f"The {self.method} edit of '{name}' has shape {tuple(delta.shape)}, but the model's weight has "
                    f"{tuple(parameters[name].shape)}: it is another model's."
                )
        # All sums first: memory may run out, and then nothing must have changed.
        values = {name: delta.added_to(parameters[name]) for name, delta in self.deltas.items()}
        for name in self.deltas:
            stack.originals.setdefault(name, parameters[name].detach().clone())
        _write(parameters, values)

    def _take_off(self, model: nn.Module, stack: _Stack) -> None:
        _rewrite(model, stack, self.deltas, stack.edits[:-1])

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        state: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, delta in self.deltas.items():
            state[name], parts = delta.to_tensors()
            tensors |= {f"{name}:{part}": tensor for part, tensor in parts.items()}
        return {"deltas": state, "touched": list(self.touched)}, tensors

    @classmethod
    def _from_state(cls, common: dict[str, Any], state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        deltas = {}
        for name, described in state["deltas"].items():
            parts = {key.rsplit(":", 1)[1]: t for key, t in tensors.items() if key.rsplit(":", 1)[0] == name}
            deltas[name] = from_tensors(described, parts)
        return cls(
            common["method"], common["fingerprint"], deltas, common["requests"], common["details"], state["touched"]
        )


class HookEdit(Edit):
    """An edit that changes what modules return and no weight: memories that are looked up on the way (GRACE, SERAC)."""

    @abstractmethod
    def _hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Registers the hooks on the unwrapped model; returns what removes them."""

    def _put_on(self, model: nn.Module, stack: _Stack) -> None:
        stack.handles[id(self)] = self._hook(model)

    def _take_off(self, model: nn.Module, stack: _Stack) -> None:
        for handle in stack.handles.pop(id(self)):
            handle.remove()


def merge(edits: Sequence[WeightEdit]) -> WeightEdit:
    """Returns one edit that adds what several add, each fitted with those before it on the model.

    Factors are laid side by side, so the rank is the sum of the ranks. The sums are those of the stack up to rounding.

    Raises:
        UserError: There is none, or one of them adds to no weights: it changes none, or :func:`fold` made it.
    """
    if not edits or not all(isinstance(edit, WeightEdit) and not edit.is_folded for edit in edits):
        raise UserError("Only edits that add to weights can be merged: give at least one, and no other kind.")
    deltas: dict[str, Delta] = {}
    for edit in edits:
        for name, delta in edit.deltas.items():
            deltas[name] = join(deltas[name], delta) if name in deltas else delta
    methods = list(dict.fromkeys(edit.method for edit in edits))
    details = {"merged": [edit.details for edit in edits]}
    requests = [request for edit in edits for request in edit.requests]
    return WeightEdit("+".join(methods), edits[0].fingerprint, deltas, requests, details, edits[0].touched)


@torch.no_grad()
def fold(model: nn.Module, number: int) -> WeightEdit:
    """Puts one edit in the place of the topmost ones on a model: it keeps the weights that they made, to the last bit.

    For many edits of whole weights, which are as large as that each. The model is not changed.

    Args:
        model: The model.
        number: How many edits are to be one.

    Raises:
        UserError: Fewer are on the model, or one of them changes no weights.
    """
    inner = unwrap(model)
    top = edits_on(model)[-number:]
    if len(top) != number or not all(isinstance(edit, WeightEdit) for edit in top):
        raise UserError(f"The topmost {number} edits are not all of the kind that adds to weights: they stay apart.")
    stack, parameters = _stacks[inner], dict(inner.named_parameters())
    deltas: dict[str, Delta] = {}
    for name in dict.fromkeys(name for edit in top if isinstance(edit, WeightEdit) for name in edit.deltas):
        values = parameters[name].detach()
        change = float((values.float() - stack.originals[name].float()).norm())
        deltas[name] = Replacement(values.to("cpu", copy=True), change)
    methods = "+".join(dict.fromkeys(edit.method for edit in top))
    requests = [request for edit in top for request in edit.requests]
    edit = WeightEdit(methods, top[0].fingerprint, deltas, requests, top[-1].details, top[0].touched)
    stack.edits[-number:] = [edit]
    return edit


def check_editable(model: nn.Module, name: str) -> None:
    """Refuses a parameter that cannot take a sum, or that another part of the model shares.

    Raises:
        UserError: No such parameter; it is quantised; or it is tied to another.
    """
    inner = unwrap(model)
    everywhere = list(inner.named_parameters(remove_duplicate=False))
    found = next((p for n, p in everywhere if n == name), None)
    if found is None:
        raise UserError(f"The model has no parameter '{name}': the edit is another model's, or an adapter renamed it.")
    if not found.is_floating_point() or found.element_size() < 2 or hasattr(found, "quant_state"):
        raise UserError(
            f"The weight '{name}' is quantised ({str(found.dtype).removeprefix('torch.')}): load the model in float32 "
            f"or bfloat16 to edit it."
        )
    if found.is_meta:
        raise UserError(f"The weight '{name}' is not in memory (offloaded): load the model whole to edit it.")
    tied = [n for n, p in everywhere if p is found and n != name]
    if tied:
        raise UserError(f"The weight '{name}' is tied to '{tied[0]}': an edit would change both. Untie them first.")
