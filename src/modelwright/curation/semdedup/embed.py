"""Text embeddings by any Hugging Face encoder, causal LM or sentence-transformers model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.errors import UserError, require

Pooling = Literal["auto", "mean", "last"]
_CHUNK = 1024


def load_embedder(
    encoder: str, pooling: Pooling = "auto", max_tokens: int = 512, batch_size: int = 32
) -> Callable[[Sequence[str]], np.ndarray]:
    """Loads a model and returns ``embed(texts) -> float32 (n, d)``, rows of length 1.

    Args:
        encoder: Folder or hub id. A folder with ``modules.json`` is a sentence-transformers model and pools as it says.
        pooling: Over the hidden states of a plain model: their ``mean`` over tokens, or the ``last`` token's (D4,
            section 3); ``auto`` takes ``last`` for causal language models and ``mean`` for the others.
        max_tokens: Longer texts are cut.
        batch_size: Texts per forward pass.

    Raises:
        UserError: The model or its tokenizer cannot be loaded.
    """
    from modelwright.models.loading import find_folder

    folder = find_folder(encoder)
    if (folder / "modules.json").is_file():
        return _sentence_transformer(folder, max_tokens, batch_size)
    return _plain(folder, pooling, max_tokens, batch_size)


def embed_all(embed: Callable[[Sequence[str]], np.ndarray], texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Embeds a stream of texts; blank ones are left out.

    Returns:
        Embeddings, float32 ``(m, d)``; their positions in the stream, int64 ``(m,)``; and the length of the stream.
    """
    parts, positions = [], []
    numbered = enumerate(texts)
    count = 0
    while chunk := list(itertools.islice(numbered, _CHUNK)):
        count += len(chunk)
        kept = [(i, t) for i, t in chunk if t and not t.isspace()]
        if kept:
            parts.append(embed([t for _, t in kept]))
            positions += [i for i, _ in kept]
    vectors = np.concatenate(parts) if parts else np.zeros((0, 1), dtype=np.float32)
    return vectors, np.array(positions, dtype=np.int64), count


def _sentence_transformer(folder: Path, max_tokens: int, batch_size: int) -> Callable[[Sequence[str]], np.ndarray]:
    library = require("sentence_transformers", "curation", "a sentence-transformers encoder")
    try:
        model = library.SentenceTransformer(
            str(folder), trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} could not be loaded as a sentence-transformers model: {_first(error)}") from error
    model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors = model.encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    return embed


def _plain(folder: Path, pooling: Pooling, max_tokens: int, batch_size: int) -> Callable[[Sequence[str]], np.ndarray]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    from modelwright.models.loading import load_config, load_tokenizer, quiet

    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        raise UserError(f"The tokenizer in {folder} has neither a padding nor an end token: add one.")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    try:
        model: Any
        # Without the head of a language model, which is reported as unexpected but is not needed.
        with quiet():
            model, info = AutoModel.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} could not be loaded as an encoder: {_first(error)}") from error
    # What is missing is filled with random numbers; only a pooling layer is not used here.
    if missing := [key for key in sorted(info["missing_keys"]) if not key.startswith("pooler.")]:
        raise UserError(f"The weights in {folder} lack {len(missing)} tensors of the model, such as {missing[0]}.")
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    limit = min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
    last = pooling == "last" or (pooling == "auto" and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES)

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> np.ndarray:
        # Texts of like length together: less padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            ).to(model.device)
            batch.pop("token_type_ids", None)
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"]
            if last:
                vectors = hidden[torch.arange(len(rows), device=mask.device), mask.sum(1) - 1]
            else:
                vectors = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            vectors = torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()
            for row, vector in zip(rows, vectors):
                found[row] = vector
        return np.stack(found).astype(np.float32)

    return embed


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
