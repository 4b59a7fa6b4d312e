"""A GRACE codebook on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from modelwright.editing.edit import Edit, HookEdit, edits_on
from modelwright.editing.grace.codebook import Codebook, Entry
from modelwright.editing.grace.replace import Rule, find_records, last_real, replace_outputs
from modelwright.editing.mlp import down_projection
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError


class GraceEdit(HookEdit):
    """A codebook that stands in for a layer's MLP output where the input is near a key. No weight changes.

    With the rule ``last`` every token, of a prompt or generated, asks for itself, so the result does not depend on the
    cache, on padding, or on what shares the batch. With ``prompt`` and ``all`` the last real token of a *call* asks for
    that call's tokens, so they depend on how a text is cut into calls: in ``generate`` with a cache that is the prompt,
    then token by token. Answers that are only scored come in a call of their own, behind the prompt.

    A codebook that was fitted with another on the model holds that one's records too; while both are on, only the
    later one answers.

    Attributes:
        codebook: The records.
        layer: Number of the layer.
        rule: See above.
        suspended: While true, the edit does nothing although it is on.
    """

    kind: ClassVar[str] = "grace"

    def __init__(
        self,
        method: str,
        fingerprint: str | None,
        codebook: Codebook,
        layer: int,
        rule: Rule = "last",
        requests: Sequence[EditRequest] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(method, fingerprint, requests, details)
        self.codebook = codebook
        self.layer = layer
        self.rule: Rule = rule
        self.reads_rows = rule != "last"
        self.suspended = False

    def delete(self, request: EditRequest | str) -> None:
        """Takes one edit out, also while the codebook is on a model: the others are as if it had never been made.

        Args:
            request: The request, or its id.

        Raises:
            UserError: The codebook does not hold it.
        """
        name = request if isinstance(request, str) else entry_id(request)
        self.codebook.delete(name)
        self.requests = tuple(r for r in self.requests if entry_id(r) != name)

    def holds(self, other: Edit) -> bool:
        """Whether this codebook has all edits of another one, for the same layer."""
        if not isinstance(other, GraceEdit) or self.layer != other.layer:
            return False
        if len(self.codebook.entries) < len(other.codebook.entries):
            return False
        return all(
            mine.id == theirs.id and torch.equal(mine.key, theirs.key)
            for mine, theirs in zip(self.codebook.entries, other.codebook.entries)
        )

    def _continued(self, model: nn.Module) -> bool:
        """Whether an edit above this one on the model has all that it has."""
        on = edits_on(model)
        place = next((i for i, edit in enumerate(on) if edit is self), len(on))
        return any(edit.holds(self) for edit in on[place + 1 :])

    def _hook(self, model: nn.Module) -> list[RemovableHandle]:
        projection = down_projection(model, self.layer)
        base = projection.base
        # A quantised weight has another shape than the map that it stands for.
        sizes = (base.nf, base.nx) if projection.transposed else (base.out_features, base.in_features)
        for entry in self.codebook.entries:
            if (len(entry.value), len(entry.key)) != sizes:
                raise UserError(
                    f"The codebook has keys of {len(entry.key)} and values of {len(entry.value)} numbers, but layer "
                    f"{self.layer} maps {sizes[1]} to {sizes[0]}: it is another model's."
                )
        masks: list[torch.Tensor | None] = [None]

        def see_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            masks[0] = kwargs.get("attention_mask")

        def replace(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self.suspended or not self.codebook.records or self._continued(model):
                return None
            inputs = args[0]
            last = last_real(masks[0], inputs.shape[0], inputs.shape[1], inputs.device)
            found = find_records(self.codebook, inputs, self.rule, last)
            if not bool((found >= 0).any()):
                return None
            return replace_outputs(output, found, self.codebook.stacked(output.device)[1])

        return [
            model.register_forward_pre_hook(see_mask, with_kwargs=True),
            projection.module.register_forward_hook(replace),
        ]

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        entries = self.codebook.entries
        state = {
            "layer": self.layer,
            "rule": self.rule,
            "radius": self.codebook.radius,
            "entries": [{"id": entry.id, "label": list(entry.label), "radius": entry.radius} for entry in entries],
            "records": self.codebook.described(),
        }
        if not entries:
            return state, {}
        return state, {
            "keys": torch.stack([entry.key for entry in entries]),
            "values": torch.stack([entry.value for entry in entries]),
        }

    @classmethod
    def _from_state(cls, common: dict[str, Any], state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        entries = [
            Entry(row["id"], tensors["keys"][i], tuple(row["label"]), tensors["values"][i], row.get("radius"))
            for i, row in enumerate(state["entries"])
        ]
        records = state.get("records")
        book = Codebook(state["radius"], entries) if records is None else Codebook.of_records(
            state["radius"], entries, records
        )  # fmt: skip
        return cls(
            common["method"], common["fingerprint"], book, state["layer"], state["rule"], common["requests"],
            common["details"],
        )  # fmt: skip


def entry_id(request: EditRequest) -> str:
    """Returns the name under which a codebook keeps a request: its id, or what it asks and shall be answered."""
    return request.id or f"{request.text} → {request.target.strip()}"
