"""Small models with weights large enough that switching a head off shows."""

import torch

from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
#: Families with attention heads; grouped queries in all but GPT-2 and GPT-NeoX, whose projections are fused.
ATTENTION = [family for family in FAMILIES if family != "mamba2"]
INPUTS = TOKENIZER(["Once upon a time there was", "short"], return_tensors="pt", padding=True)
HEADS = [(0, 1), (1, 2)]


def make(family="llama", **options):
    return tiny_model(family, **{"initializer_range": 0.3, "eos_token_id": None, **options})


def rows(texts, side="left"):
    """Tokens and mask of texts, padded on a side."""
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    width = max(map(len, ids))
    out, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
    for row, own in enumerate(ids):
        at = slice(width - len(own), width) if side == "left" else slice(0, len(own))
        out[row, at], mask[row, at] = torch.tensor(own), 1
    return out, mask
