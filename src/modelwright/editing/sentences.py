"""Texts as vectors: by an encoder, or by the hidden states of the model that is edited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelwright.models.loading import find_folder, load_checked, load_config, load_tokenizer
from modelwright.models.roles import unwrap
from modelwright.models.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_encoder(path_or_id: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an encoder of texts and its tokenizer.

    Raises:
        UserError: There is none, or it is damaged.
    """
    from transformers import AutoModel

    folder = find_folder(path_or_id)
    encoder = load_checked(
        AutoModel, folder, load_config(folder), what="an encoder of texts", optional=("pooler",), device="cpu"
    )
    return encoder.eval(), load_tokenizer(folder)


def text_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the tokens of the longest text that an encoder, or a causal language model, can embed."""
    longest = context_length(model) or 512
    # RoBERTa and its kin count positions from the padding id on, so that some are lost.
    padding = getattr(getattr(unwrap(model).base_model, "embeddings", None), "padding_idx", None)
    if padding is not None:
        longest -= padding + 1
    return int(min(longest, tokenizer.model_max_length))


@torch.no_grad()
def sentence_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """Returns the mean of each text's last hidden states, scaled to length 1: as most sentence encoders do it.

    Args:
        model: An encoder, or a causal language model.
        tokenizer: Its tokenizer.
        texts: What to embed; ends that are too long for the model are cut off.
        batch_size: Texts at once.

    Returns:
        (texts, size) float32, on the CPU.
    """
    body: Any = getattr(unwrap(model), "base_model", model)
    longest, vocabulary = text_limit(model, tokenizer), model.get_input_embeddings().weight.shape[0]
    found = []
    for start in range(0, len(texts), batch_size):
        some = [text or " " for text in texts[start : start + batch_size]]
        rows = tokenizer(some, truncation=True, max_length=longest)["input_ids"]
        # Padded here: many tokenizers of language models have no padding token, and some give token types to models
        # that take them for tokens (GPT-2).
        ids = torch.full((len(rows), max(map(len, rows))), min(tokenizer.pad_token_id or 0, vocabulary - 1))
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mask = mask[..., None].to(hidden)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(mean, dim=1).cpu())
    return torch.cat(found)
