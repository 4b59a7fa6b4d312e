"""How often each token type stands in a corpus, kept with the fingerprint of the tokenizer that cut it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright.errors import UserError
from modelwright.files import atomic_path
from modelwright.models.tokenizers import encode, leading_ids
from modelwright.probing.fair_lm.bins import check_counts
from modelwright.probing.fair_lm.report import read_table
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Characters handed to the tokenizer at once.
_BATCH_CHARACTERS = 1 << 20
#: Tokenizers of one vocabulary that cut text differently (other merges, another normaliser) differ somewhere in here.
_PROBE = (
    " The quick brown fox's 1234567 jumped over\tthe lazy dog!!\n\n    def f(x): return x**2 # naïve café\r\n"
    "ÅÉÎÕÜ ǅ ﬁ ½ ０１ Здравствуй мир, γειά σου, 你好世界 こんにちは 안녕 مرحبا 🙂👩‍👩‍👧"
    " http://a.b/c?d=e&f internationalization"
)


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """Occurrences of each type, as targets of packed training.

    Attributes:
        counts: (V,) int64.
        tokenizer: Fingerprint of the tokenizer, or None where it is not known.
        documents: Number of documents.
    """

    counts: np.ndarray
    tokenizer: str | None = None
    documents: int = 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.counts, dtype=dtype)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def tokens(self) -> int:
        """All occurrences."""
        return int(self.counts.sum())

    def resized(self, vocab_size: int) -> TokenCounts:
        """Returns the counts for a model whose table has ``vocab_size`` rows, as many are padded beyond the tokenizer.

        Raises:
            UserError: A type that was counted has no row.
        """
        if vocab_size < len(self.counts) and self.counts[vocab_size:].any():
            raise UserError(
                f"The counts are for {len(self.counts)} token types, but the model knows only {vocab_size}: they are "
                f"of another tokenizer."
            )
        counts = np.zeros(vocab_size, np.int64)
        kept = min(vocab_size, len(self.counts))
        counts[:kept] = self.counts[:kept]
        return TokenCounts(counts, self.tokenizer, self.documents)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses another tokenizer than the one that the counts are of; says nothing where that one is not known.

        Raises:
            UserError: It is another.
        """
        if self.tokenizer is not None and self.tokenizer != tokenizer_fingerprint(tokenizer):
            raise UserError(
                "The counts are of another tokenizer than the model's: the same number would mean another token. Count "
                "the training corpus again with `modelwright probe token-counts`."
            )

    def save(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, force: bool = False) -> None:
        """Writes ``token_id``, ``token`` (its text, with a tokenizer) and ``count`` of all types as Parquet.

        Raises:
            UserError: The file exists and ``force`` is off.
        """
        import pyarrow
        from pyarrow import parquet

        columns: dict[str, Any] = {"token_id": np.arange(len(self.counts))}
        if tokenizer is not None:
            names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
            columns["token"] = [*names, *[None] * len(self.counts)][: len(self.counts)]
        columns["count"] = self.counts
        about = json.dumps({"tokenizer": self.tokenizer, "documents": self.documents})
        table = pyarrow.table(columns).replace_schema_metadata({"modelwright.token_counts": about})
        with atomic_path(path, force) as partial:
            parquet.write_table(table, partial)

    @classmethod
    def load(cls, path: str | Path) -> TokenCounts:
        """Reads a Parquet file with columns ``token_id`` and ``count``, ours or anyone's; types it lacks count 0.

        Raises:
            UserError: The file is none of these, or a count is negative.
        """
        table = read_table(path)
        if missing := {"token_id", "count"} - set(table.column_names):
            raise UserError(
                f"{path} has no column '{min(missing)}': counts have the columns token_id and count, as `modelwright "
                f"probe token-counts` writes them."
            )
        at, values = (table[name].to_numpy() for name in ("token_id", "count"))
        if not len(at) or not np.issubdtype(at.dtype, np.integer) or at.min() < 0:
            raise UserError(f"{path}: token_id must be whole numbers from 0.")
        if len(np.unique(at)) < len(at):
            raise UserError(f"{path} counts a token twice.")
        counts = np.zeros(int(at.max()) + 1, np.int64)
        counts[at] = check_counts(values)
        about = json.loads((table.schema.metadata or {}).get(b"modelwright.token_counts", b"{}"))
        return cls(counts, about.get("tokenizer"), about.get("documents", 0))


def count_tokens(
    data: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str = "text",
    progress: Progress | None = None,
) -> TokenCounts:
    """Counts the types of a corpus once, as a stream.

    Documents count as packed training sees them: with what the tokenizer puts before a text, and with an end token
    behind it. Rows that are tokenised already count where they are targets: from the second token on, without labels of
    -100 and without padding.

    Args:
        data: Texts, or rows with a text in ``text_field``, or rows with ``input_ids`` (and ``labels``,
            ``attention_mask``).
        tokenizer: Cuts the texts; its fingerprint is kept.
        text_field: Field of a row that holds the text.
        progress: Counts documents.

    Raises:
        UserError: A row is none of these, an id is outside the vocabulary, or there is nothing to count.
    """
    progress = progress or Silent()
    progress.start("count tokens")
    counts, documents = np.zeros(len(tokenizer), np.int64), 0
    around = len(leading_ids(tokenizer)), tokenizer.eos_token_id is not None
    for batch in _batches(data, text_field):
        texts = [row for row in batch if isinstance(row, str)]
        rows = encode(tokenizer, texts) + [row for row in batch if not isinstance(row, str)]
        for token in leading_ids(tokenizer) if around[0] else ():
            counts[token] += len(texts)
        if around[1]:
            counts[tokenizer.eos_token_id] += len(texts)
        ids = np.fromiter(chain.from_iterable(rows), np.int64)
        if len(ids):
            if ids.min() < 0 or ids.max() >= len(counts):
                raise UserError(
                    f"Token {int(ids.max() if ids.max() >= len(counts) else ids.min())} is outside the tokenizer's "
                    f"vocabulary of {len(counts)}: the rows were made with another one."
                )
            counts += np.bincount(ids, minlength=len(counts))
        documents += len(batch)
        progress.advance(len(batch))
    if not counts.any():
        raise UserError("There is nothing to count: the corpus is empty.")
    return TokenCounts(counts, tokenizer_fingerprint(tokenizer), documents)


def _batches(data: Iterable[Any], text_field: str) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for number, row in enumerate(data, 1):
        if isinstance(row, Mapping):
            row = row[text_field] if isinstance(row.get(text_field), str) else _targets(row, number, text_field)
        if not isinstance(row, str | list):
            raise UserError(f"Row {number} is of type {type(row).__name__}: give texts, or rows with '{text_field}'.")
        batch.append(row)
        size += len(row)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _targets(row: Mapping[str, Any], number: int, text_field: str) -> list[int]:
    import torch

    from modelwright.probing.fair_lm.tracker import scored_positions

    if "input_ids" not in row:
        raise UserError(f"Row {number} has neither '{text_field}' nor 'input_ids' (fields: {', '.join(row)}).")

    def one(name: str) -> torch.Tensor | None:
        return None if row.get(name) is None else torch.as_tensor(row[name]).reshape(1, -1)

    labels = one("labels") if row.get("labels") is not None else one("input_ids")
    assert labels is not None
    return scored_positions(labels, one("attention_mask"), one("position_ids"))[2].tolist()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what tells tokenizers apart: SHA-256 (hex) of the vocabulary, and of how a text with traps is cut.

    Saving and loading, padding sides and chat templates do not change it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, list(probe)]).encode()).hexdigest()
