"""Texts before a prompt, so that an edit does not hang on the prompt standing at the beginning.

ROME (arXiv 2202.05262, section 3.1) averages over short texts that the model itself samples. They are sampled anew for
each model, with a seed of their own: the same model gives the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from modelwright.editing.edit import unedited
from modelwright.editing.subject import check_tokens, encode_prompt
from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What sampled texts begin with.
STARTERS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def sample_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    top_k: int = 5,
) -> list[str]:
    """Samples texts to stand before a prompt, each ended by a full stop and a space; the empty one comes first.

    Edits that are on the model are looked past, so that a sequence of edits that is resumed has the same contexts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        lengths: Tokens of a continuation, and how many of that length for each of :data:`STARTERS`.
        seed: Seed of the draws.
        top_k: Draw among this many most probable tokens.

    Returns:
        1 + 5 · Σ count texts.
    """
    texts = [""]
    generator = torch.Generator().manual_seed(seed)
    with unedited(model):
        for length, count in lengths:
            rows = [encode_prompt(tokenizer, starter) for starter in STARTERS for _ in range(count)]
            check_tokens(model, [[*row, *([0] * length)] for row in rows])
            for _ in range(length if rows else 0):
                logits = _next_logits(model, rows)
                values, tokens = logits.topk(min(top_k, logits.shape[-1]))
                picked = torch.multinomial(values.softmax(-1), 1, generator=generator)
                for row, token in zip(rows, tokens.gather(1, picked)[:, 0].tolist()):
                    row.append(token)
            texts += [tokenizer.decode(row, skip_special_tokens=True).strip() + ". " for row in rows]
    return texts


def check_contexts(contexts: Sequence[str]) -> list[str]:
    """Returns contexts that a user gives, the empty one first, for it is that of the prompt itself.

    Raises:
        UserError: They are no list of texts.
    """
    if isinstance(contexts, str) or not all(isinstance(text, str) for text in contexts):
        raise UserError("contexts must be a list of texts that are put before the prompt as they are.")
    return ["", *(text for text in contexts if text)]


def _next_logits(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Returns the logits after each row: (rows, vocabulary), float32, on the CPU."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    last = mask.sum(1).to(logits.device) - 1
    return logits[torch.arange(len(rows), device=logits.device), last].float().cpu()
