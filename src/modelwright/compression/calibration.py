"""Calibration text as batches of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from modelwright.errors import UserError
from modelwright.models.scoring import context_length
from modelwright.progress import Progress
from modelwright.training.packing import PackedBlocks, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens of a block at most, unless the user says another number (the paper's).
LONGEST = 2048


class CalibrationBatches(Iterable[dict[str, torch.Tensor]]):
    """Texts as an endless stream of batches, in an order that the seed alone decides.

    Documents are read as a stream and tokenised once; they are joined, cut into blocks, and shuffled anew each pass.

    Args:
        model: The model, which bounds the length.
        tokenizer: Its tokenizer.
        texts: Documents.
        block_size: Tokens of a block; None takes 2,048, or the model's context if it is shorter.
        batch_size: Blocks of a batch.
        seed: Of the order.
        progress: Counts documents.

    Raises:
        UserError: The text is shorter than one block, or a size does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        *,
        block_size: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        longest = context_length(model)
        self.block_size = block_size or min(LONGEST, longest or LONGEST)
        if batch_size < 1 or self.block_size < 2:
            raise UserError("A batch needs at least one block, and a block at least 2 tokens.")
        if longest is not None and self.block_size > longest:
            raise UserError(f"A block of {self.block_size} tokens is longer than the model's context of {longest}.")
        stream = tokenize(texts, tokenizer, None, progress)
        if len(stream.tokens) < self.block_size:
            raise UserError(
                f"The calibration text has {len(stream.tokens)} tokens, fewer than one block of {self.block_size}: "
                f"give more text, or a smaller --block-size."
            )
        self.batch_size = batch_size
        self.blocks = PackedBlocks(stream.tokens, self.block_size, 1, seed)
        self.tokens, self.documents = len(stream.tokens), stream.documents

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        start = 0
        while True:
            yield self.blocks.__getitems__(range(start, start + self.batch_size))
            start += self.batch_size
