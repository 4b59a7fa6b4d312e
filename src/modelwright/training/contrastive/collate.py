"""Rows of pairs to the inputs of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modelwright.errors import UserError
from modelwright.training.contrastive.images import to_rgb


@dataclass(frozen=True)
class PairCollator:
    """Turns rows ``{"query": image or text, "key": text, "negatives": [text, …]}`` into a batch; picklable.

    Only the rows given are padded, and no further than their longest text, except for models that were trained on
    texts of one length.

    Attributes:
        tokenizer: Of the texts.
        max_tokens: Longest text, special tokens included; longer ones are cut.
        image_processor: Of the images; None where queries are texts.
        pad_to_max: Whether every text is padded to ``max_tokens``, as SigLIP was trained.
        prompt: Put before every text.
        lower: Whether texts are lower-cased first.
    """

    tokenizer: Any
    max_tokens: int
    image_processor: Any = None
    pad_to_max: bool = False
    prompt: str = ""
    lower: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns a batch of m pairs.

        Image-text: ``pixel_values`` (m, channels, height, width) float32 and whatever else the image processor gives,
        ``input_ids`` (m, length) int64, and ``attention_mask`` if the tokenizer makes one. Text-text: the tokenizer's
        outputs, of queries as ``query_*`` and of keys as ``key_*``. Hard negatives, h for each row, row after row, in
        both cases as ``negative_*`` (m * h, length).

        Raises:
            UserError: There is no row, a query or key is of the wrong kind, or the numbers of negatives differ.
        """
        if not rows:
            raise UserError("A batch of no pairs was asked for.")
        keys = self._texts([row["key"] for row in rows])
        if self.image_processor is not None:
            batch = self._images([row["query"] for row in rows]) | keys
        else:
            batch = _prefixed("query_", self._texts([row["query"] for row in rows])) | _prefixed("key_", keys)
        negatives = [row.get("negatives") or [] for row in rows]
        counts = {len(n) for n in negatives}
        if len(counts) > 1:
            raise UserError(
                f"Rows of one batch have {min(counts)} to {max(counts)} hard negatives: every row needs equally many."
            )
        if counts != {0}:
            batch |= _prefixed("negative_", self._texts([text for row in negatives for text in row]))
        return batch

    def _images(self, images: list[Any]) -> dict[str, Tensor]:
        found = self.image_processor([to_rgb(image) for image in images], return_tensors="pt")
        return dict(found)

    def _texts(self, texts: list[Any]) -> dict[str, Tensor]:
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"A text of the pairs is of type {type(text).__name__}: expected a string.")
        texts = [self.prompt + (text.lower() if self.lower else text) for text in texts]
        options: dict[str, Any] = {} if self.image_processor is not None else {"return_attention_mask": True}
        found = self.tokenizer(
            texts,
            padding="max_length" if self.pad_to_max else True,
            padding_side="right",  # where the last token is looked for, and where positions count from the first one
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            **options,
        )
        return dict(found)


def _prefixed(prefix: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in batch.items()}
