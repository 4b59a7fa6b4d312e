"""GRACE's fit: keys from the model, values by gradient descent (arXiv 2211.11031, algorithm 1)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from modelwright.editing.edit import edits_on
from modelwright.editing.editor import Editor
from modelwright.editing.examples import Examples, check_finite, make_examples, target_loss, trainable_only
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.grace.codebook import Codebook, Entry
from modelwright.editing.grace.edit import GraceEdit, entry_id
from modelwright.editing.grace.replace import Rule, find_records, replace_outputs
from modelwright.editing.mlp import chosen_layer, down_projection
from modelwright.editing.requests import EditRequest, check_requests
from modelwright.errors import UserError
from modelwright.models.roles import unwrap
from modelwright.options import Arg
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class GRACE(Editor):
    """GRACE: remember the layer's input at the end of each prompt, and a learned output to give there instead.

    Fitted on a model that has a codebook for the layer on it already, it continues that one (in a copy).
    """

    name: ClassVar[str] = "grace"
    changes_weights: ClassVar[bool] = False
    stronger: ClassVar[str] = "raise steps, change learning_rate, or take a layer further up (--set layer=…)"

    layer: Annotated[int | None, Arg("Layer whose MLP output is replaced; 27 of 32 by default.")] = None
    radius: Annotated[float, Arg("Radius of a new key (ε).")] = 1.0
    steps: Annotated[int, Arg("Steps that train a value.")] = 50
    learning_rate: Annotated[float, Arg("Adam's learning rate for a value.")] = 1.0
    start: Annotated[
        Literal["cold", "warm"], Arg("A value starts at random in [0, 1) (cold) or as what the layer puts out (warm).")
    ] = "cold"
    replace: Annotated[
        Rule, Arg("last: each token asks for itself; all, prompt: a call's last token asks for all, or up to it.")
    ] = "last"
    seed: Annotated[int, Arg("Seed of cold starts.")] = 0

    def __post_init__(self) -> None:
        if not (self.radius > 0 and 0 < self.learning_rate < math.inf) or self.steps < 0:
            raise UserError("radius and learning_rate must be above 0, and steps not below 0.")

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> GraceEdit:
        """See :meth:`Editor.fit`. Requests are put in one after the other, since each may split or grow another's ball.

        ``details`` has the layer and, for each request, ``case`` (add, grow or split), ``distance`` from the nearest
        key, and the ``loss`` before and after training.
        """
        check_requests(requests)
        progress = progress or Silent()
        layer = chosen_layer(model, self.layer, 27)
        module = down_projection(model, layer).module
        before = [e for e in edits_on(model) if isinstance(e, GraceEdit) and e.layer == layer]
        book = before[-1].codebook.copy() if before else Codebook(self.radius)
        generator = torch.Generator().manual_seed(self.seed)
        notes = []
        with trainable_only(model), torch.enable_grad(), _suspended(before):
            for request in requests:
                examples = make_examples(model, tokenizer, [(request.text, request.target)])
                key, output = _at_last(model, module, examples)
                case, near, distance = book.case(key, examples.targets[0], self.radius)
                if case == "grow" and near is not None:
                    value = book.records[near].value
                elif self.start == "warm":
                    value = output
                else:
                    value = torch.rand(output.shape, generator=generator)
                index = book.add(Entry(entry_id(request), key, examples.targets[0], value, self.radius))
                value, losses = self._train(model, module, book, index, examples)
                book.set_value(value)
                note: dict[str, Any] = {"case": case, "loss_before": losses[0], "loss": losses[-1]}
                notes.append(note | ({"distance": distance} if near is not None else {}))
                progress.advance(1, f"{case}, loss {losses[-1]:.3g}")
        known = [r for e in before[-1:] for r in e.requests]
        return GraceEdit(
            self.name, model_fingerprint(model), book, layer, self.replace, [*known, *requests],
            {"layer": layer, "edits": notes},
        )  # fmt: skip

    def _train(
        self, model: PreTrainedModel, module: nn.Module, book: Codebook, index: int, examples: Examples
    ) -> tuple[torch.Tensor, list[float]]:
        """Trains the last edit's value with the codebook in use; returns it and the losses, the last after training."""
        entry = book.entries[-1]
        value = entry.value.to(examples.input_ids.device).clone().requires_grad_()
        values = book.stacked(value.device)[1]
        chosen = (torch.arange(len(values), device=value.device) == index)[:, None]
        last = int(examples.last[0])

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            # The key itself is not looked up: no rounding shall lose it.
            if self.replace == "last":
                found = find_records(book, args[0].detach(), "last", examples.last).clone()
                found[:, last] = index
            else:
                found = torch.full(args[0].shape[:2], index, device=value.device)
                if self.replace == "prompt":
                    found[:, last + 1 :] = -1
            return replace_outputs(output, found, torch.where(chosen, value, values))

        optimizer = torch.optim.Adam([value], lr=self.learning_rate)
        losses = []
        handle = module.register_forward_hook(hook)
        try:
            for step in range(self.steps + 1):
                loss = target_loss(model(**examples.inputs).logits, examples)
                losses.append(float(loss.detach()))
                check_finite(losses[-1], self.name)
                if step < self.steps:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        finally:
            handle.remove()
        return value.detach().cpu(), losses


@contextlib.contextmanager
def _suspended(edits: Sequence[GraceEdit]) -> Iterator[None]:
    """Keeps the edits that the new codebook continues from answering inside the block."""
    continued = [e for e in edits if edits[-1].holds(e)]
    try:
        for edit in continued:
            edit.suspended = True
        yield
    finally:
        for edit in continued:
            edit.suspended = False


def _at_last(model: PreTrainedModel, module: nn.Module, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a layer's input (d_ff,) and output (d,) at the prompt's last token, float32 on the CPU."""
    kept: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        at = int(examples.last[0])
        kept[:] = [args[0][0, at].detach().float().cpu(), output[0, at].detach().float().cpu()]

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        with torch.no_grad():
            unwrap(model)(**examples.inputs)
    finally:
        handle.remove()
    return kept[0], kept[1]
