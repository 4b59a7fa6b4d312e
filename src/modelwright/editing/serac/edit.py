"""A SERAC memory on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer

from modelwright.editing.edit import Edit, HookEdit, edits_on
from modelwright.editing.requests import EditRequest
from modelwright.editing.serac.parts import SeracParts
from modelwright.errors import UserError
from modelwright.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: In place of the number of an edit: out of scope; padding.
_NONE, _PADDING = -1, -2


class SeracEdit(HookEdit):
    """Edits in a memory. No weight of the model changes; a small model answers what is in an edit's scope.

    The scope is asked once for each row, about the text of its first call (in ``generate``: the prompt), and then kept
    with the cache, through beam search too. Without a cache each call asks anew, about all that it is given. Rows out
    of scope get the model's own logits, bit for bit. In scope, the small model reads the edit and then the whole text
    so far.

    Attributes:
        parts: The trained parts.
        tokenizer: The model's tokenizer.
        memory: (edits, size): the edits' embeddings; the cross-encoder keeps none.
        threshold: Score above which an input is in scope.
    """

    kind: ClassVar[str] = "serac"
    reads_rows = True

    def __init__(
        self,
        method: str,
        fingerprint: str | None,
        parts: SeracParts | None,
        tokenizer: PreTrainedTokenizerBase | None,
        memory: torch.Tensor,
        threshold: float = 0.5,
        requests: Sequence[EditRequest] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(method, fingerprint, requests, details)
        # They are None only between the two steps of reading a saved edit.
        self.parts: Any = parts
        self.tokenizer: Any = tokenizer
        self.memory = memory
        self.threshold = threshold

    @torch.no_grad()
    def scope(self, model: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each text's highest score (n,), and the number of that edit (n,) int64 or −1 where it is too low."""
        if not self.requests:
            return torch.zeros(len(texts)), torch.full((len(texts),), _NONE)
        best, index = self.parts.scores(model, self.tokenizer, texts, self.requests, self.memory).max(1)
        return best, torch.where(best > self.threshold, index, _NONE)

    def holds(self, other: Edit) -> bool:
        """Whether this memory has all edits of another one that has the same parts."""
        if not isinstance(other, SeracEdit) or self.parts.identity != other.parts.identity:
            return False
        return self.requests[: len(other.requests)] == other.requests

    def _hook(self, model: nn.Module) -> list[RemovableHandle]:
        return [model.register_forward_hook(self._answer, with_kwargs=True)]

    @torch.no_grad()
    def _answer(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        on = edits_on(model)
        place = next((i for i, edit in enumerate(on) if edit is self), len(on))
        continued = any(edit.holds(self) for edit in on[place + 1 :])
        if continued or not self.requests:
            return None
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UserError("SERAC reads the prompt's tokens: call the model with input_ids, not with embeddings.")
        logits = output[0] if isinstance(output, tuple) else output.logits
        layer = self._layer(getattr(output, "past_key_values", None))
        picks = self._picks(model, ids, kwargs.get("attention_mask"), layer)
        history = ids if layer is None else layer.keys[:, 0, :, 0]
        new = self._replaced(model, logits, history, picks)
        if new is logits:
            return None
        if isinstance(output, tuple):
            return (new, *output[1:])
        output.logits = new
        if kwargs.get("labels") is not None:
            output.loss = model.loss_function(new, kwargs["labels"], vocab_size=new.shape[-1])
        return output

    def _layer(self, cache: Any) -> _ScopeLayer | None:
        """Returns this edit's own layer of a cache, which is put there at the first call."""
        if not isinstance(cache, Cache):
            return None
        for layer in cache.layers:
            if isinstance(layer, _ScopeLayer) and layer.owner is self:
                return layer
        layer = _ScopeLayer(self)
        # transformers takes the first full (or sliding) layer for the mask: ours must never be the first of its kind.
        layer.is_sliding = bool(cache.layers and getattr(cache.layers[-1], "is_sliding", False))
        cache.layers.append(layer)
        return layer

    def _picks(self, model: Any, ids: torch.Tensor, mask: Any, layer: _ScopeLayer | None) -> torch.Tensor:
        """Returns (rows, tokens so far) int64: the edit that a token's row is in scope of, −1, or −2 for padding."""
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].to(ids.device).bool()
        if layer is not None and layer.is_initialized and layer.get_seq_length():
            found = layer.values[:, 0, :, 0].amax(1)
        else:
            rows = [row[kept].tolist() for row, kept in zip(ids, real, strict=True)]
            _, found = self.scope(model, [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows])
        picks = torch.where(real, found.to(ids.device)[:, None], _PADDING)
        if layer is None:
            return picks
        layer.append(ids, picks)
        return layer.values[:, 0, :, 0]

    def _replaced(self, model: Any, logits: torch.Tensor, history: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        """Returns logits in which rows in scope have the small model's; the same object if there is none."""
        chosen = picks.amax(1)
        inside = (chosen >= 0).nonzero()[:, 0].tolist()
        if not inside:
            return logits
        real = picks != _PADDING
        rows = [history[i][real[i]].tolist() for i in inside]
        requests = [self.requests[int(chosen[i])] for i in inside]
        small = self.parts.logits(self.tokenizer, requests, rows, logits.shape[-1], logits.device)
        new = logits.clone()
        width = logits.shape[1]  # the last positions of the call, all or one of them
        for i, predicted in zip(inside, small, strict=True):
            whole = logits.new_zeros(history.shape[1], logits.shape[-1])
            whole[real[i]] = predicted.to(logits)
            kept = real[i, -width:]
            new[i, kept] = whole[-width:][kept]
        return new

    def save(self, folder: str | Path, force: bool = False) -> None:
        """See :meth:`Edit.save`; a further edit with the same parts shares their files, by hard links."""
        super().save(folder, force)
        self.parts.folder = Path(folder) / "parts"

    def write(self, folder: Path) -> None:
        """See :meth:`Edit.write`; the small model, the encoder and the tokenizer are laid beside."""
        super().write(folder)
        (folder / "parts").mkdir()
        self.parts.write(folder / "parts")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def _read(self, folder: Path) -> None:
        self.parts, self.tokenizer = SeracParts.read(folder / "parts"), load_tokenizer(folder / "tokenizer")

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {"threshold": self.threshold}, {"memory": self.memory}

    @classmethod
    def _from_state(cls, common: dict[str, Any], state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        return cls(
            common["method"], common["fingerprint"], None, None, tensors["memory"], state["threshold"],
            common["requests"], common["details"],
        )  # fmt: skip


class _ScopeLayer(DynamicLayer):
    """A layer of the model's cache that holds tokens and decisions, so that beams reorder and crop them with the rest.

    ``keys`` are the tokens so far and ``values`` their rows' decisions, both (rows, 1, tokens, 1) int64.
    """

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, owner: SeracEdit) -> None:
        super().__init__()
        self.owner = owner

    def append(self, ids: torch.Tensor, picks: torch.Tensor) -> None:
        """Adds tokens (rows, n) with their decisions."""
        keys, values = ids[:, None, :, None], picks[:, None, :, None]
        if self.is_initialized and self.keys is not None and self.keys.numel():
            keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
