"""Sums of loss, occurrences and hits for each token type, exact over any number of batches and processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modelwright.errors import UserError
from modelwright.probing.fair_lm.chunks import token_losses
from modelwright.probing.fair_lm.report import TokenLossReport

#: A loss this far below 0 is rounding, and counts as 0.
_ROUNDING = 1e-5


class TokenLossTracker:
    """Adds up losses by target type: float64 sums, so that the order and size of batches do not matter.

    State is three numbers for each type, on the CPU. Means are never merged: sums are.

    Args:
        vocab_size: V, the width of the logits.
        ignore_index: Label of positions that do not count.
        tokenizer: Fingerprint of the tokenizer, to be kept with the result.

    Raises:
        UserError: A vocabulary of less than one type.
    """

    def __init__(self, vocab_size: int, ignore_index: int = -100, tokenizer: str | None = None) -> None:
        if vocab_size < 1:
            raise UserError(f"A vocabulary has at least one token, not {vocab_size}.")
        self.vocab_size, self.ignore_index, self.tokenizer = int(vocab_size), ignore_index, tokenizer
        # Rows: sum of losses, occurrences, hits. Counts in float64 are exact to 2 ** 53.
        self._sums = torch.zeros(3, self.vocab_size, dtype=torch.float64)
        self._knows_hits = True

    @torch.no_grad()
    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch. Labels are shifted here, as in transformers: position t's logits predict label t + 1.

        Args:
            logits: (batch, length, V), any floating-point dtype; brought to float32 a part at a time.
            labels: (batch, length) int64.
            attention_mask: See :func:`scored_positions`; needed where padding has a label, such as the end token's.
            position_ids: Likewise, for packed documents.

        Raises:
            UserError: Shapes or vocabulary do not fit, a label is outside [0, V), or a loss is not a number.
        """
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise UserError(
                f"Logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}: give "
                f"(batch, length, vocabulary) and (batch, length)."
            )
        if logits.shape[-1] != self.vocab_size:
            raise UserError(
                f"The logits are for {logits.shape[-1]} token types, but the tracker is for {self.vocab_size}."
            )
        rows, positions, targets = scored_positions(labels, attention_mask, position_ids, self.ignore_index)
        self.check_targets(targets)
        nll, correct = token_losses(logits, rows, positions, targets)
        self.update_from_nll(nll, targets, correct)

    @torch.no_grad()
    def update_from_nll(self, nll: torch.Tensor, targets: torch.Tensor, correct: torch.Tensor | None = None) -> None:
        """Adds losses that were computed elsewhere.

        Args:
            nll: (…) losses in nats; those of ignored targets may be anything.
            targets: (…) int64, the types; nothing is shifted.
            correct: (…) bool, whether the target had the largest logit; without it there is no accuracy.

        Raises:
            UserError: Shapes do not fit, a target is outside [0, V), or a loss is negative or not finite.
        """
        if nll.shape != targets.shape or (correct is not None and correct.shape != targets.shape):
            raise UserError(f"{tuple(nll.shape)} losses do not fit {tuple(targets.shape)} targets.")
        keep = targets != self.ignore_index
        types = targets[keep].reshape(-1).cpu()
        losses = nll[keep].reshape(-1).cpu().double()
        self.check_targets(types)
        if not len(types):
            return
        if not bool(torch.isfinite(losses).all()):
            at = int(torch.isfinite(losses).logical_not().nonzero()[0])
            raise UserError(
                f"The loss of a token of type {int(types[at])} is {float(losses[at])}: the model's weights hold values "
                f"that are not finite, or they overflow in this dtype."
            )
        if float(losses.min()) < -_ROUNDING:
            raise UserError(f"A loss is {float(losses.min())}: a negative log-probability cannot be below 0.")
        self._sums[0].index_add_(0, types, losses.clamp_min_(0))
        self._sums[1] += torch.bincount(types, minlength=self.vocab_size)
        if correct is None:
            self._knows_hits = False
        else:
            self._sums[2] += torch.bincount(types[correct[keep].reshape(-1).cpu()], minlength=self.vocab_size)

    def check_targets(self, targets: torch.Tensor) -> None:
        """Refuses targets that are no types of this vocabulary.

        Raises:
            UserError: One is outside [0, V).
        """
        if not targets.numel():
            return
        low, high = (int(value) for value in targets.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"Label {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}: the data are of "
                f"another tokenizer, or positions to leave out are not marked {self.ignore_index}."
            )

    def merge(self, other: TokenLossTracker) -> TokenLossTracker:
        """Adds what another tracker has seen, and returns this one.

        Raises:
            UserError: It is of another vocabulary.
        """
        if other.vocab_size != self.vocab_size:
            raise UserError(
                f"Losses of vocabularies of {self.vocab_size} and {other.vocab_size} types cannot be merged."
            )
        if None not in (self.tokenizer, other.tokenizer) and self.tokenizer != other.tokenizer:
            raise UserError("Losses of different tokenizers cannot be merged.")
        self._sums += other._sums
        self._knows_hits &= other._knows_hits
        return self

    def all_reduce(self, group: Any = None) -> TokenLossTracker:
        """Adds up the processes of a distributed run, each of which then has the whole; does nothing in a single one.

        All must call it. Sums are reduced, so that unequal shares of the data weigh as they should.

        Args:
            group: Process group; all processes by default.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return self
        device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
        lacking = torch.tensor([[float(not self._knows_hits)]], dtype=torch.float64).expand(3, 1)
        whole = torch.cat([self._sums, lacking], dim=1).to(device)
        dist.all_reduce(whole, group=group)
        self._sums = whole[:, :-1].cpu().contiguous()
        self._knows_hits = not bool(whole[0, -1])
        return self

    def compute(self) -> TokenLossReport:
        """Returns the report of all that was added.

        Raises:
            UserError: Nothing was added: every target was ignored.
        """
        loss, counts, correct = (row.numpy().copy() for row in self._sums)
        if not counts.any():
            raise UserError("There is no target to measure: every label is ignored, or there are no data.")
        return TokenLossReport(
            loss,
            counts.astype(np.int64),
            correct.astype(np.int64) if self._knows_hits else None,
            self.tokenizer,
        )


def scored_positions(
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns which logits predict which targets.

    Args:
        labels: (batch, length) int64.
        attention_mask: (batch, length); targets that are masked do not count, nor does the first token behind padding
            on the left, which would be predicted from padding. So a padded batch, on whichever side, measures what its
            sequences measure alone. (A mask of more dimensions, as of packed data, says nothing of padding.)
        position_ids: (batch, length) or (1, length); a target at position 0 begins a packed document, and does not
            count: the document before it says nothing of it.
        ignore_index: Label of positions that do not count.

    Returns:
        (n,) batch indices, (n,) positions whose logits predict, and (n,) targets.
    """
    keep = labels[:, 1:] != ignore_index
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask.to(labels.device).bool()
        keep = keep & real[:, 1:] & real[:, :-1]
    if position_ids is not None:
        keep = keep & (position_ids.to(labels.device).expand_as(labels)[:, 1:] != 0)
    rows, positions = keep.nonzero(as_tuple=True)
    return rows, positions, labels[:, 1:][keep]
