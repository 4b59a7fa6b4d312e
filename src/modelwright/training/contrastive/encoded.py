"""What an encoder of pairs returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Encoded(NamedTuple):
    """Embeddings of a batch of m pairs, rows of length 1, and what turns their cosines into logits.

    Attributes:
        queries: (m, d): images, or the first texts.
        keys: (m, d): texts; row i belongs to query i.
        negatives: (m * h, d), h hard negatives for each pair, those of one pair together; or None.
        scale: (), multiplies the cosines.
        bias: (), is added to the logits of the sigmoid loss; None for the softmax loss.
    """

    queries: Tensor
    keys: Tensor
    negatives: Tensor | None
    scale: Tensor
    bias: Tensor | None
