"""Where GRACE's values stand in for a layer's outputs."""

from __future__ import annotations

from typing import Literal

import torch

from modelwright.editing.grace.codebook import Codebook

#: ``last``: every token asks for itself. ``all`` and ``prompt``: a call's last real token asks for all of its tokens,
#: or for those up to it.
Rule = Literal["last", "all", "prompt"]


def last_real(attention_mask: torch.Tensor | None, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Returns (rows,) int64: the last token of a call that is not padding.

    Args:
        attention_mask: (rows, ≥ length), of which the last ``length`` columns are this call's tokens; None or a mask of
            another shape means that there is no padding on the right.
        rows: Rows of the call.
        length: Tokens of the call.
        device: Of the result.
    """
    last = torch.full((rows,), length - 1, device=device)
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.shape[0] != rows:
        return last
    own = attention_mask[:, -length:].to(device).bool()
    places = torch.where(own, torch.arange(own.shape[1], device=device), -1).amax(1)
    return torch.where(places >= 0, places, last)


def find_records(codebook: Codebook, inputs: torch.Tensor, rule: Rule, last: torch.Tensor) -> torch.Tensor:
    """Returns (rows, length) int64: the record that gives each token its output, or −1.

    Args:
        codebook: The records.
        inputs: (rows, length, d_ff): the layer's inputs.
        rule: See :data:`Rule`.
        last: (rows,) int64: each row's last real token; only for the rules that ask it.
    """
    rows, length, _ = inputs.shape
    if rule == "last":
        return codebook.look_up(inputs.flatten(0, 1)).view(rows, length)
    asked = codebook.look_up(inputs[torch.arange(rows, device=inputs.device), last])
    found = asked[:, None].expand(rows, length)
    if rule == "prompt":
        found = torch.where(torch.arange(length, device=inputs.device) <= last[:, None], found, -1)
    return found


def replace_outputs(outputs: torch.Tensor, found: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns the outputs with records' values in place of some; bit for bit the same where none is found.

    Args:
        outputs: (rows, length, d).
        found: (rows, length) int64, as :func:`find_records` gives it.
        values: (records, d).
    """
    return torch.where(found[..., None] >= 0, values.to(outputs.dtype)[found.clamp(min=0)], outputs)
