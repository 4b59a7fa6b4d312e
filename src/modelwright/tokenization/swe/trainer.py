"""SWE: a sub-word vocabulary trained like BPE, but by the likelihood of the training text.

Li, arXiv 2410.18441 (2024), describes the idea without equations or numbers: BPE's setting (word frequencies,
characters, ordered merges) with WordPiece's objective. What is here is a reconstruction: each merge is the one with
the greatest exact gain in unigram likelihood (``likelihood.py``). The best merge at each step is not
the best vocabulary, which is NP-hard to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelwright.errors import UserError
from modelwright.tokenization.swe.likelihood import Merge
from modelwright.tokenization.swe.words import Alphabet, byte_alphabet, count_words, splitting


@dataclass(kw_only=True)
class LikelihoodBpeTrainer:
    """Trains a tokenizer whose merges are chosen by likelihood.

    Attributes:
        vocab_size: Tokens at most: special tokens, alphabet, merges. Fewer if no merge raises the likelihood.
        min_frequency: A pair must occur this often to be merged.
        refine: None keeps the merges: the tokenizer is a BPE model whose merge order is the priority. ``em`` then fits
            probabilities to the vocabulary and segments by them: a Unigram model, with a likelihood at least as good.
        prune_from: Train this many tokens first and drop those that are worth least until ``vocab_size`` are left; the
            tokenizer is then a Unigram model. None does not.
        prune_share: Share of the vocabulary dropped between two segmentations; 0 drops one token at a time, which is
            exact and slow.
        alphabet: ``byte``: every text has tokens and comes back exactly; a word takes the blank before it along.
            ``character``: the characters of the training text, a mark before each word (the paper has it at the end;
            the merges then differ, the objective does not), and an unknown token; blanks come back as one blank.
        max_token_length: Longest token in symbols of the alphabet.
        special_tokens: First entries of the vocabulary.
        unknown_token: Stands for characters outside the alphabet; only for ``character``.
    """

    vocab_size: int = 8192
    min_frequency: int = 2
    refine: Literal["em"] | None = None
    prune_from: int | None = None
    prune_share: float = 0.1
    alphabet: Alphabet = "byte"
    max_token_length: int | None = None
    special_tokens: Sequence[str] = ()
    unknown_token: str = "<unk>"

    #: The merges of the last training, in order, with their gains.
    merges: tuple[Merge, ...] = ()

    def train(self, files: str | Path | Sequence[str | Path], *, text_field: str = "text") -> Any:
        """Trains on files, folders, patterns or hub ids; see :meth:`train_from_iterator`.

        Raises:
            UserError: A source does not exist or cannot be read.
        """
        from modelwright.data.records import Records

        return self.train_from_iterator(Records(files, text_field).texts())

    def train_from_iterator(self, texts: Iterable[str], *, on_merge: Callable[[Merge], None] | None = None) -> Any:
        """Trains on texts, read once as a stream; what is kept in memory are their different words.

        Args:
            texts: Texts.
            on_merge: Called after each merge.

        Returns:
            A ``tokenizers.Tokenizer``. The same texts give the same one.

        Raises:
            UserError: An option is out of range, the vocabulary cannot hold the alphabet, or there is no text.
        """
        self._check()
        special = list(dict.fromkeys([*self.special_tokens, *([self.unknown_token] if self._character else [])]))
        words, _ = count_words(texts, self.alphabet, special)
        if not words:
            raise UserError("There is no text to train a tokenizer on.")
        letters = sorted(set().union(*words)) if self._character else byte_alphabet()
        if self.vocab_size < len(special) + len(letters):
            raise UserError(
                f"vocab_size is {self.vocab_size}, but the alphabet has {len(letters)} symbols and there are "
                f"{len(special)} special tokens: give at least {len(special) + len(letters)}."
            )
        size = self.vocab_size - len(special)
        from modelwright.tokenization.swe.merging import PairIndex

        spelled = sorted(words)
        corpus = PairIndex(
            letters,
            spelled,
            [words[word] for word in spelled],
            min_frequency=self.min_frequency,
            max_length=self.max_token_length,
        )
        most = max(size, (self.prune_from or 0) - len(special)) - len(letters)
        self.merges = tuple(_watched(corpus.merges(most), on_merge))
        if taken := set(special) & set(corpus.symbols):
            raise UserError(f"The special token '{min(taken)}' is an ordinary token too: give it another name.")
        if self.refine is None and self.prune_from is None:
            return self._export(special, self._bpe([*special, *corpus.symbols]))

        from modelwright.tokenization.swe import refine

        counts = dict(zip(corpus.symbols, corpus.counts.tolist()))
        symbols = corpus.symbols
        if self.prune_from is not None:
            symbols, counts = refine.prune(words, symbols, counts, size, share=self.prune_share)
        else:
            counts, _ = refine.expectation_maximisation(words, symbols, counts)
        scores = refine.log_probabilities(symbols, counts, max(map(len, words)))
        floor = min(scores.values())
        model = refine.unigram_model(
            {**dict.fromkeys(special, floor), **scores}, self.unknown_token if self._character else None
        )
        return self._export(special, model)

    @property
    def _character(self) -> bool:
        return self.alphabet == "character"

    def _check(self) -> None:
        if self.alphabet not in ("byte", "character"):
            raise UserError(f"alphabet must be 'byte' or 'character', not {self.alphabet!r}.")
        if self.refine not in (None, "em"):
            raise UserError(f"refine must be None or 'em', not {self.refine!r}.")
        if self.min_frequency < 1:
            raise UserError(f"min_frequency is {self.min_frequency}: give at least 1.")
        if not 0 <= self.prune_share < 1:
            raise UserError(f"prune_share is {self.prune_share}: give a share from 0 to below 1.")
        if self.prune_from is not None and self.prune_from < self.vocab_size:
            raise UserError(f"prune_from is {self.prune_from}, below vocab_size {self.vocab_size}: give more.")
        if self.max_token_length is not None and self.max_token_length < 2:
            raise UserError(f"max_token_length is {self.max_token_length}: give at least 2.")

    def _bpe(self, vocabulary: list[str]) -> Any:
        from tokenizers import models

        return models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=[merge.pair for merge in self.merges],
            unk_token=self.unknown_token if self._character else None,
        )

    def _export(self, special: list[str], model: Any) -> Any:
        from tokenizers import AddedToken, Tokenizer

        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer, tokenizer.decoder = splitting(self.alphabet)
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        return tokenizer


def _watched(merges: Iterator[Merge], on_merge: Callable[[Merge], None] | None) -> Iterator[Merge]:
    for merge in merges:
        if on_merge is not None:
            on_merge(merge)
        yield merge
