"""Runs a model over documents or tokenised rows, and tracks the loss of each target."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modelwright.errors import UserError
from modelwright.models.scoring import resolve_window, windows
from modelwright.models.tokenizers import encode, prefix_ids
from modelwright.probing.fair_lm.chunks import ChunkedModel
from modelwright.probing.fair_lm.tracker import TokenLossTracker, scored_positions
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Documents are taken up until there is this much text, which is then cut into windows and sorted by length.
_GROUP_CHARACTERS = 1 << 20


def measure_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> TokenLossTracker:
    """Measures every token of documents once: those of :func:`~modelwright.models.scoring.score_documents`.

    A document stands behind the tokenizer's prefix; one that is longer than the window is read in windows that overlap.
    The texts are a stream, and may be larger than memory.

    Args:
        model: A causal language model, of any dtype; the logits of a whole batch are never there at once.
        tokenizer: Its tokenizer.
        texts: Documents.
        window: Longest input in tokens; None takes the model's own, at most 2,048.
        stride: New tokens a window; None takes half of it.
        batch_size: Windows at once; does not change the result beyond rounding.
        progress: Counts documents.

    Raises:
        UserError: Window or stride do not fit the model, or the tokenizer has more tokens than the model.
    """
    from modelwright.probing.fair_lm.counts import tokenizer_fingerprint

    progress = progress or Silent()
    window, stride = resolve_window(model, window, stride)
    prefix = prefix_ids(tokenizer)
    if window <= len(prefix):
        raise UserError(f"A window of {window} tokens leaves no room beside the prefix of {len(prefix)}.")
    with evaluating(model) as chunked:
        tracker = TokenLossTracker(chunked.vocab_size, tokenizer=tokenizer_fingerprint(tokenizer))
        progress.start("token loss")
        for group in _groups(texts, 16 * batch_size):
            queue = [part for row in encode(tokenizer, group) for part in windows(row, prefix, window, stride)]
            queue.sort(key=lambda part: -len(part[0]))  # those of like length share a batch, which spares padding
            for start in range(0, len(queue), batch_size):
                _add_windows(chunked, tracker, queue[start : start + batch_size])
            progress.advance(len(group))
    return tracker


def _groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) >= size or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _add_windows(chunked: ChunkedModel, tracker: TokenLossTracker, batch: Sequence[tuple[list[int], int]]) -> None:
    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, (tokens, _) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    rows = torch.cat([torch.full((scored,), row) for row, (_, scored) in enumerate(batch)])
    at = torch.cat([torch.arange(len(tokens) - scored, len(tokens)) for tokens, scored in batch])
    targets = ids[rows, at]
    tracker.check_targets(ids)
    inputs = {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}
    device = chunked.model.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    nll, correct = chunked.losses(inputs, rows, at - 1, targets)
    tracker.update_from_nll(nll.cpu(), targets, correct.cpu())


def measure_rows(
    model: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]] | None = None,
    ignore_index: int = -100,
    tokenizer: str | None = None,
) -> TokenLossTracker:
    """Measures tokenised rows as a ``Trainer`` would evaluate them.

    Args:
        model: A causal language model, bare or wrapped for data-parallel training or with adapters.
        rows: With ``input_ids`` and, where they are known, ``labels`` (those of the inputs by default),
            ``attention_mask`` and ``position_ids`` (which begin anew at packed documents).
        batch_size: Rows at once.
        collate: Makes a batch of tensors of rows; by default rows are padded on the right and padding is masked.
        ignore_index: Label of positions that do not count.
        tokenizer: Fingerprint of the tokenizer, to be kept with the result.

    Raises:
        UserError: A row has no ``input_ids``, a label is outside the vocabulary, or the model's loss is not a number.
    """
    with evaluating(model) as chunked:
        tracker = TokenLossTracker(chunked.vocab_size, ignore_index, tokenizer)
        stream = iter(rows)
        while part := list(islice(stream, batch_size)):
            batch = dict((collate or pad_rows)(part))
            labels = batch.pop("labels", None)
            if labels is None:
                labels = batch["input_ids"]
            device = chunked.model.device
            inputs = {n: v.to(device) for n, v in batch.items() if isinstance(v, torch.Tensor)}
            _place(chunked, inputs)
            at, positions, targets = scored_positions(
                labels, batch.get("attention_mask"), batch.get("position_ids"), ignore_index
            )
            tracker.check_targets(targets)
            nll, correct = chunked.losses(inputs, at, positions, targets)
            tracker.update_from_nll(nll.cpu(), targets.cpu(), correct.cpu())
    return tracker


def _place(chunked: ChunkedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Counts positions from the first real token, where a collator padded on the left and gave none.

    A model with learned positions, such as GPT-2, would take those of the padding as well.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or "position_ids" in inputs or bool(mask[:, 0].all()):
        return
    if "position_ids" in inspect.signature((chunked.body or chunked.model).forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)


def measure_blocks(model: Any, blocks: np.ndarray, *, batch_size: int = 8) -> TokenLossTracker:
    """Measures packed blocks (n, length) of integers, as training sees them: a document's start is predicted too."""
    rows = ({"input_ids": torch.from_numpy(block.astype(np.int64))} for block in blocks)
    return measure_rows(model, rows, batch_size=batch_size, collate=_stack)


def _stack(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


def pad_rows(rows: list[Any], ignore_index: int = -100) -> dict[str, torch.Tensor]:
    """Pads rows of different lengths on the right.

    Args:
        rows: See :func:`measure_rows`.
        ignore_index: Label of the padding.

    Returns:
        (batch, length) ``input_ids``, ``labels``, ``attention_mask`` and, where all rows have them, ``position_ids``.

    Raises:
        UserError: A row has no ``input_ids``, or fields of different lengths.
    """
    fill = {"input_ids": 0, "labels": ignore_index, "attention_mask": 0, "position_ids": 0}
    filled: list[dict[str, torch.Tensor]] = []
    for row in rows:
        if "input_ids" not in row:
            raise UserError(f"A row has no 'input_ids' (fields: {', '.join(row)}): tokenise the data first.")
        given = {name: torch.as_tensor(row[name]).long() for name in fill if row.get(name) is not None}
        given.setdefault("labels", given["input_ids"])
        given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        if len({value.shape for value in given.values()}) > 1:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
            raise UserError(f"A row's fields differ in length: {shapes}.")
        filled.append(given)
    names = [name for name in fill if all(name in row for row in filled)]
    return {
        name: torch.nn.utils.rnn.pad_sequence([r[name] for r in filled], batch_first=True, padding_value=fill[name])
        for name in names
    }


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[ChunkedModel]:
    """Yields the model for measuring, in evaluation mode, and brings it back to the mode it was in."""
    chunked = ChunkedModel(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield chunked
    finally:
        for module, mode in modes:
            module.training = mode
