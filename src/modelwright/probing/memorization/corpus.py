"""A tokenised corpus on disk, larger than memory if need be, and the sequences that are cut from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelwright.errors import UserError
from modelwright.files import atomic_path, read_json, write_json
from modelwright.models.tokenizers import encode
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Documents, and characters, that are tokenised at once.
_GROUP, _CHARACTERS = 512, 1 << 22


class Places(NamedTuple):
    """Where sequences begin.

    Attributes:
        start: (n,) int64, position among all tokens.
        document: (n,) int64, number of the document.
        offset: (n,) int64, tokens of the document before it.
    """

    start: np.ndarray
    document: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class TokenCorpus:
    """All tokens of a corpus, one document after the other, without anything between them.

    Attributes:
        folder: Holds ``tokens.bin`` (uint16, or uint32 for large vocabularies), ``boundaries.npy`` and ``corpus.json``.
        dtype: Of the tokens.
        tokenizer_hash: Of the tokenizer that made them: see :func:`tokenizer_hash`.
    """

    folder: Path
    dtype: str
    tokenizer_hash: str

    @classmethod
    def open(cls, folder: str | Path) -> TokenCorpus:
        """Opens what :func:`tokenize_corpus` wrote.

        Raises:
            UserError: The folder holds no such corpus, or a part of it.
        """
        folder = Path(folder)
        described = read_json(folder / "corpus.json")
        corpus = cls(folder, described["dtype"], described["tokenizer_hash"])
        if corpus.tokens.size != described["tokens"]:
            raise UserError(f"{folder / 'tokens.bin'} is cut off: remove the folder and tokenise the corpus again.")
        return corpus

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,) of :attr:`dtype`, mapped from disk."""
        path = self.folder / "tokens.bin"
        if not path.stat().st_size:
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r")

    @cached_property
    def boundaries(self) -> np.ndarray:
        """(documents + 1,) int64: where each document begins, and the end of the last."""
        return np.load(self.folder / "boundaries.npy", mmap_mode="r")

    def places(self, length: int, every: int | None = None) -> Places:
        """Returns where sequences begin.

        Args:
            length: Tokens of a sequence; documents with fewer give none.
            every: None takes the beginning of each document (the paper: of each training example); a number takes a
                sequence every so many tokens of it.
        """
        starts, ends = self.boundaries[:-1], self.boundaries[1:]
        sizes = np.asarray(ends - starts)
        per = (sizes >= length).astype(np.int64)
        if every is not None:
            if every < 1:
                raise UserError(f"A sequence every {every} tokens cannot be: give at least 1.")
            per = np.where(sizes >= length, (sizes - length) // every + 1, 0)
        document = np.repeat(np.arange(len(sizes)), per)
        offset = (np.arange(len(document)) - np.repeat(np.cumsum(per) - per, per)) * (every or 0)
        return Places(np.asarray(starts)[document] + offset, document, offset)

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns (n, length) int64: the tokens from each start on."""
        return np.asarray(self.tokens[starts[:, None] + np.arange(length)], dtype=np.int64)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash (hex) that is the same for tokenizers with the same vocabulary and rules.

    Of fast tokenizers everything counts that makes tokens of text, of slow ones the vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        for changing in ("padding", "truncation"):
            described.pop(changing, None)
        text = json.dumps(described, sort_keys=True)
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def tokenize_corpus(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> TokenCorpus:
    """Tokenises documents as a stream, into a folder that appears whole or not at all.

    Args:
        texts: Documents.
        tokenizer: Its special tokens are not added.
        folder: To write.
        progress: Where to show progress.
        force: Replace an existing folder.

    Raises:
        UserError: The folder exists, or no document has a token.
    """
    progress = progress or Silent()
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    boundaries = [0]
    progress.start("tokenise")
    with atomic_path(folder, force) as partial:
        partial.mkdir()
        with (partial / "tokens.bin").open("wb") as stream:
            for group in _groups(texts):
                for row in encode(tokenizer, group):
                    np.asarray(row, dtype=dtype).tofile(stream)
                    boundaries.append(boundaries[-1] + len(row))
                progress.advance(len(group), f"{boundaries[-1]:,} tokens")
        if not boundaries[-1]:
            raise UserError("The corpus has no tokens: give documents with text.")
        np.save(partial / "boundaries.npy", np.array(boundaries, dtype=np.int64))
        described = {"tokens": boundaries[-1], "documents": len(boundaries) - 1, "dtype": dtype.name}
        write_json(partial / "corpus.json", described | {"tokenizer_hash": tokenizer_hash(tokenizer)})
    return TokenCorpus.open(folder)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) >= _GROUP or characters >= _CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def decode(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Any] | np.ndarray) -> list[str]:
    """Returns the texts of sequences, with special tokens and without cleaning up spaces."""
    if not len(sequences):
        return []  # of nothing, batch_decode makes one empty text
    return list(
        tokenizer.batch_decode(
            [[int(token) for token in row] for row in sequences],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
    )
