"""Documents to packed blocks: tokenised once, joined, cut, and shuffled in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modelwright.errors import UserError
from modelwright.models.tokenizers import encode, leading_ids
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Characters handed to the tokenizer at once: enough for its threads, little enough for memory.
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TokenStream:
    """All documents as one stream of tokens.

    Attributes:
        tokens: (tokens,) uint16 or uint32; each document followed by the end token. A memory map if it lies in a file.
        documents: Number of documents.
        bytes: Their length in UTF-8 bytes.
    """

    tokens: np.ndarray
    documents: int
    bytes: int


def tokenize(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    path: Path | None = None,
    progress: Progress | None = None,
) -> TokenStream:
    """Tokenises documents and joins them: ``doc <eos> doc <eos> …``.

    Every document stands behind what :func:`~modelwright.models.tokenizers.prefix_ids` names, in training as in
    evaluation: the tokenizer's own leading tokens, or the end token of the document before.

    Args:
        texts: Documents, read once as a stream.
        tokenizer: Needs an end token.
        path: File for the tokens, if they are to be kept there and mapped instead of held in memory.
        progress: Counts documents.

    Raises:
        UserError: The tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end token (eos_token), so documents cannot be told apart: give it one.")
    progress = progress or Silent()
    progress.start("tokenise")
    leading, end = leading_ids(tokenizer), [tokenizer.eos_token_id]
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts: list[np.ndarray] = [] if leading else [np.array(end, dtype=dtype)]
    documents = length = 0
    stream = path.open("wb") if path is not None else None
    try:
        for batch in _batches(texts):
            ids = [token for row in encode(tokenizer, batch) for token in (*leading, *row, *end)]
            parts.append(np.array(ids, dtype=dtype))
            documents += len(batch)
            length += sum(len(text.encode()) for text in batch)
            if stream is not None:
                np.concatenate(parts).tofile(stream)
                parts.clear()
            progress.advance(len(batch))
    finally:
        if stream is not None:
            stream.close()
    if path is not None and path.stat().st_size:
        return TokenStream(np.memmap(path, dtype=dtype, mode="r"), documents, length)
    return TokenStream(np.concatenate(parts) if parts else np.empty(0, dtype), documents, length)


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class PackedBlocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Blocks of ``block_size`` tokens in the order in which training sees them, for as long as training lasts.

    The stream is cut at every ``block_size`` tokens and the rest dropped. Item ``i`` is block ``order_e[i mod n]`` of
    pass ``e = i div n``, where ``order_e`` is a permutation drawn from ``(seed, e)``: the order is the same whatever
    the number of processes, and resuming needs no more than the position. There is no attention boundary between
    documents in a block.

    Args:
        tokens: (tokens,) integers.
        block_size: Tokens a block.
        length: Items in all; may be many passes over the data.
        seed: Seed of the order.

    Raises:
        UserError: There are fewer tokens than one block.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, length: int, seed: int = 0) -> None:
        self.blocks = len(tokens) // block_size
        if self.blocks == 0:
            raise UserError(
                f"The training data have {len(tokens)} tokens, fewer than one block of {block_size}: "
                f"give more data, or a smaller block size."
            )
        self.tokens = tokens[: self.blocks * block_size].reshape(self.blocks, block_size)
        self.length, self.seed = length, seed
        self._pass: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns a batch: ``input_ids`` and ``labels``, the same (len(indices), block_size) int64 tensor."""
        # The DataLoader calls this with a whole batch, which spares a collator that stacks rows.
        rows = [self._order(index // self.blocks)[index % self.blocks] for index in indices]
        ids = torch.from_numpy(self.tokens[rows].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def _order(self, number: int) -> np.ndarray:
        if self._pass[0] != number:
            self._pass = (number, np.random.default_rng((self.seed, number)).permutation(self.blocks))
        return self._pass[1]


def as_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The collator for :class:`PackedBlocks`, which gives whole batches already."""
    return batch
