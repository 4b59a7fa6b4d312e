"""Which sequences a model can recite: k-extractability, and how well it predicts each part.

A sequence is a prompt and its true continuation. It is *memorised* if greedy search from the prompt gives every token
of the continuation. Greedy search gives the continuation exactly if at every place, with the true tokens before it,
the likeliest token is the true one; so one forward pass decides what would otherwise take a pass for each token.

Greedy search depends on rounding where two tokens are nearly equal: use float32 where the last sequence matters.

Source: section 2 of the paper; Carlini et al. 2022 for the definition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from modelwright.errors import UserError
from modelwright.models.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["teacher-forced", "generate"]
#: Logits (numbers) that are brought to float64 at once: 128 MiB, whatever the vocabulary.
_CHUNK = 1 << 24


class Extractability(NamedTuple):
    """Scores of sequences.

    Attributes:
        scores: (n,) float64, share of the continuation's places where the model's token is the true one. By
            ``teacher-forced`` after the true tokens, by ``generate`` after the model's own; both are 1 for the same
            sequences, and may differ for all others.
        memorized: (n,) bool, whether all places agree.
    """

    scores: np.ndarray
    memorized: np.ndarray


class Perplexities(NamedTuple):
    """Perplexities of sequences, each (n,) float64.

    Attributes:
        prompt: Of the prompt's tokens but the first, which has no context.
        continuation: Of the continuation's tokens.
        sequence: Of both.
    """

    prompt: np.ndarray
    continuation: np.ndarray
    sequence: np.ndarray


class Reading(NamedTuple):
    """What one forward pass tells of a batch.

    Attributes:
        matches: (n, continuation) bool, whether the likeliest token is the true one.
        nats: (n, length - 1) float64, negative log-probability of each true token but the first.
    """

    matches: np.ndarray
    nats: np.ndarray


def extractability(
    model: PreTrainedModel,
    sequences: Any,
    prompt_len: int = 32,
    cont_len: int = 32,
    method: Method = "teacher-forced",
    *,
    leading: Sequence[int] = (),
    batch_size: int = 64,
) -> Extractability:
    """Tests which sequences a model recites.

    Args:
        model: A causal language model in evaluation mode.
        sequences: (n, length) integers, or an iterable of such blocks, which are read one at a time. Tokens after the
            first ``prompt_len + cont_len`` are left out.
        prompt_len: Tokens of the prompt.
        cont_len: Tokens of the continuation.
        method: ``teacher-forced`` (one pass a batch), or ``generate``: greedy search with a key-value cache, without
            an end token, sampling, penalties or whatever else the model's generation config asks for.
        leading: Tokens before every prompt, such as the beginning token that Llama and Gemma are trained with:
            ``leading_ids(tokenizer)``.
        batch_size: Sequences at once.

    Raises:
        UserError: Sequences are too short, are no tokens of the model, or do not fit its context.
    """
    if method not in ("teacher-forced", "generate"):
        raise UserError(f"The method is '{method}': use teacher-forced or generate.")
    found = []
    for batch in _batches(model, sequences, prompt_len, cont_len, batch_size, len(leading)):
        if method == "generate":
            found.append(_generated(model, batch, prompt_len, leading) == batch[:, prompt_len:])
        else:
            found.append(read(model, batch, prompt_len, leading).matches)
    matches = np.concatenate(found) if found else np.zeros((0, cont_len), dtype=bool)
    return Extractability(matches.mean(1), np.asarray(matches.all(1)))


def part_perplexities(
    model: PreTrainedModel,
    sequences: Any,
    prompt_len: int = 32,
    cont_len: int = 32,
    *,
    legacy: bool = False,
    leading: Sequence[int] = (),
    batch_size: int = 64,
) -> Perplexities:
    """Returns the perplexities of prompt, continuation and whole, from log-probabilities in float64.

    Args:
        model: A causal language model in evaluation mode.
        sequences: See :func:`extractability`.
        prompt_len: Tokens of the prompt.
        cont_len: Tokens of the continuation.
        legacy: As in the official code: both parts are divided by the whole's number of predictions (so that they are
            about the square root of what they should be), and for every token 0 in a sequence one prediction at its
            end is dropped.
        leading: See :func:`extractability`; the same predictions are measured with and without.
        batch_size: Sequences at once.

    Raises:
        UserError: See :func:`extractability`.
    """
    parts = []
    for batch in _batches(model, sequences, prompt_len, cont_len, batch_size, len(leading)):
        parts.append(perplexities(read(model, batch, prompt_len, leading).nats, prompt_len, batch if legacy else None))
    return Perplexities(*(np.concatenate([p[i] for p in parts]) if parts else np.zeros(0) for i in range(3)))


def perplexities(nats: np.ndarray, prompt_len: int, legacy_tokens: np.ndarray | None = None) -> Perplexities:
    """Returns perplexities from negative log-probabilities.

    Args:
        nats: (n, length - 1) float64: see :class:`Reading`.
        prompt_len: Tokens of the prompt.
        legacy_tokens: (n, length), for the official code's numbers: see :func:`part_perplexities`.
    """
    if legacy_tokens is None:
        split = prompt_len - 1
        prompt = nats[:, :split].mean(1) if split else np.zeros(len(nats))
        return Perplexities(np.exp(prompt), np.exp(nats[:, split:].mean(1)), np.exp(nats.mean(1)))
    rows = []
    for row, tokens in zip(nats, legacy_tokens, strict=True):
        kept = row[: max(1, len(row) - int((tokens == 0).sum()))]
        middle = len(kept) // 2
        rows.append([kept[:middle].sum() / len(kept), kept[middle:].sum() / len(kept), kept.mean()])
    return Perplexities(*np.exp(np.array(rows).reshape(-1, 3).T))


@torch.no_grad()
def read(model: PreTrainedModel, tokens: np.ndarray, prompt_len: int, leading: Sequence[int] = ()) -> Reading:
    """Reads a batch of checked sequences once.

    Args:
        model: The model.
        tokens: (n, length) int64.
        prompt_len: Tokens of the prompt.
        leading: Tokens before every prompt.

    Raises:
        UserError: The model gives no numbers.
    """
    ids = torch.as_tensor(tokens, device=model.device)
    logits = model(input_ids=_led(ids, leading), use_cache=False).logits[:, len(leading) : -1]
    targets = ids[:, 1:].to(logits.device)
    nats = torch.empty(targets.shape, dtype=torch.float64)
    matches = torch.empty(targets.shape, dtype=torch.bool)
    step = max(1, _CHUNK // (logits.shape[1] * logits.shape[2]))
    for start in range(0, len(ids), step):
        at = slice(start, start + step)
        chunk = logits[at].double()
        matches[at] = (chunk.argmax(-1) == targets[at]).cpu()
        nats[at] = (chunk.logsumexp(-1) - chunk.gather(-1, targets[at][..., None])[..., 0]).cpu()
    if bool(nats.isnan().any()):
        raise UserError("The model's scores are no numbers (NaN): load it in another dtype, such as float32.")
    return Reading(matches[:, prompt_len - 1 :].numpy(), nats.numpy())


@torch.no_grad()
def _generated(model: PreTrainedModel, tokens: np.ndarray, prompt_len: int, leading: Sequence[int] = ()) -> np.ndarray:
    ids = _led(torch.as_tensor(tokens[:, :prompt_len], device=model.device), leading)
    with _bare_generation(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=tokens.shape[1] - prompt_len,
            pad_token_id=0,
        )
    return out[:, ids.shape[1] :].cpu().numpy()


def _led(ids: torch.Tensor, leading: Sequence[int]) -> torch.Tensor:
    return torch.cat([ids.new_tensor(list(leading)).expand(len(ids), -1), ids], dim=1) if leading else ids


@contextlib.contextmanager
def _bare_generation(model: PreTrainedModel) -> Iterator[None]:
    # What a checkpoint asks for (an end token, penalties, banned tokens) is no part of the definition, and generate
    # merges it in wherever a call leaves a field open.
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _batches(
    model: PreTrainedModel, sequences: Any, prompt_len: int, cont_len: int, batch_size: int, leading: int
) -> Iterator[np.ndarray]:
    if prompt_len < 1 or cont_len < 1 or batch_size < 1:
        raise UserError("prompt_len, cont_len and batch_size must be at least 1.")
    longest = context_length(model)
    if longest is not None and leading + prompt_len + cont_len > longest:
        raise UserError(
            f"Sequences of {leading + prompt_len + cont_len} tokens do not fit the model, which takes {longest}."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    blocks: Iterable[Any] = [sequences] if hasattr(sequences, "shape") or _is_nested(sequences) else sequences
    for block in blocks:
        checked = check_sequences(block, prompt_len + cont_len, vocabulary)
        for start in range(0, len(checked), batch_size):
            yield checked[start : start + batch_size]


def _is_nested(sequences: Any) -> bool:
    return isinstance(sequences, list | tuple) and bool(sequences) and not hasattr(sequences[0], "shape")


def check_sequences(sequences: Any, length: int, vocabulary: int | None = None) -> np.ndarray:
    """Returns sequences as (n, length) int64, cut to that length.

    Args:
        sequences: (n, at least length) integers: numpy, torch or lists of lists.
        length: Tokens that are needed.
        vocabulary: Size of the vocabulary; None leaves it unchecked.

    Raises:
        UserError: They are of another shape, too short, no whole numbers, or outside the vocabulary.
    """
    if isinstance(sequences, torch.Tensor):
        sequences = sequences.cpu().numpy()
    try:
        array = np.asarray(sequences)
    except ValueError as error:
        raise UserError("Sequences differ in length: cut them to the same number of tokens.") from error
    if array.ndim != 2 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(
            f"Sequences must be a table of token ids (n, length), not {array.dtype} of shape {array.shape}."
        )
    if array.shape[1] < length:
        raise UserError(
            f"Sequences have {array.shape[1]} tokens, but prompt and continuation need {length}: give longer "
            f"sequences, or a shorter prompt and continuation."
        )
    array = array[:, :length].astype(np.int64)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise UserError(
            f"Token {wrong} is outside the vocabulary of {vocabulary}: these sequences are another tokenizer's."
        )
    return array
