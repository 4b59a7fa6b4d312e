"""The table of features: what columns it has, how it is built, and what is refused.

Source: section 3 of the paper.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from modelwright.errors import UserError
from modelwright.models.tokenizers import leading_ids
from modelwright.probing.memorization.corpus import TokenCorpus, decode, tokenizer_hash
from modelwright.probing.memorization.duplicates import count_duplicates, token_frequencies
from modelwright.probing.memorization.extraction import Perplexities, check_sequences, part_perplexities
from modelwright.probing.memorization.neighbours import Embedder, matches
from modelwright.probing.memorization.templating import shannon_code_length, templating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: A pandas table with the columns :data:`COLUMNS`, a row a sequence, and any others beside them.
FeatureTable: TypeAlias = pd.DataFrame

FREQUENCIES = (
    "frequency_max", "frequency_mean", "frequency_min", "frequency_median", "frequency_p25", "frequency_p75",
)  # fmt: skip
PERPLEXITIES = ("prompt_perplexity", "continuation_perplexity", "sequence_perplexity")
#: Numbers, which the predictive models standardise.
CONTINUOUS = (
    "sequence_duplicates", *FREQUENCIES, *PERPLEXITIES, "textual_matches", "semantic_matches", "huffman_coding_length",
)  # fmt: skip
#: Truth values, which they take as 0 and 1.
BINARY = ("is_templating",)
#: What the predictive models read.
PREDICTORS = (*CONTINUOUS, *BINARY)
#: All columns of the table.
COLUMNS = (*CONTINUOUS, "is_incrementing", "is_repeating", *BINARY)


class NotInCorpus(UserWarning):
    """A sequence that should be from the corpus is not in it."""


def build_features(
    sequences: Any,
    corpus: TokenCorpus | Any,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    *,
    prompt_len: int = 32,
    cont_len: int = 32,
    perplexities: Perplexities | None = None,
    sample: Any = None,
    embedder: Embedder | None = None,
    document_boundaries: Any = None,
    frequencies: np.ndarray | None = None,
    in_corpus: bool = True,
    legacy: bool = False,
    workers: int = 1,
) -> FeatureTable:
    """Computes all features of sequences.

    Args:
        sequences: (n, at least ``prompt_len + cont_len``) whole numbers.
        corpus: Where duplicates and frequencies are counted: a :class:`TokenCorpus`, or (tokens,) whole numbers.
        tokenizer: The tokenizer of the sequences and the corpus.
        model: The model under study, for the perplexities; prompts stand behind the tokenizer's leading tokens.
        prompt_len: Tokens of the prompt.
        cont_len: Tokens of the continuation.
        perplexities: Of these sequences, if they are known; then no model is needed.
        sample: (m, length) sequences of the corpus in which semantic and textual matches are counted; None takes
            ``sequences`` themselves.
        embedder: See :func:`~modelwright.probing.memorization.neighbours.semantic_matches`.
        document_boundaries: See :func:`~modelwright.probing.memorization.duplicates.count_duplicates`; a
            :class:`TokenCorpus` brings its own.
        frequencies: (vocabulary,) counts of tokens, if they are known.
        in_corpus: The sequences are from the corpus, so that a count of 0 is warned of.
        legacy: Templates and perplexities as the official code has them.
        workers: Processes that count duplicates.

    Returns:
        A table with :data:`COLUMNS`.

    Raises:
        UserError: Sequences are too short or hold unknown tokens, or the corpus was made by another tokenizer.
    """
    length = prompt_len + cont_len
    tokens = check_sequences(sequences, length, len(tokenizer))
    row: Any = corpus
    if isinstance(corpus, TokenCorpus):
        if corpus.tokenizer_hash != tokenizer_hash(tokenizer):
            raise UserError(
                f"The corpus in {corpus.folder} was made by another tokenizer than the sequences': tokenise both alike."
            )
        row, document_boundaries = corpus.tokens, corpus.boundaries[1:-1]
    counts = token_frequencies(row, len(tokenizer)) if frequencies is None else frequencies
    duplicates = count_duplicates(row, tokens[:, prompt_len:], document_boundaries=document_boundaries, workers=workers)
    if in_corpus and (missing := int((duplicates == 0).sum())):
        warnings.warn(
            f"{missing} of {len(tokens)} sequences are not in the corpus (0 duplicates): is it the one they are from?",
            NotInCorpus,
            stacklevel=2,
        )
    if perplexities is None:
        if model is None:
            raise UserError("Perplexities need a model, or must be given.")
        leading = leading_ids(tokenizer)
        perplexities = part_perplexities(model, tokens, prompt_len, cont_len, legacy=legacy, leading=leading)
    columns: dict[str, Any] = {"sequence_duplicates": duplicates}
    columns |= frequency_columns(counts[tokens])
    columns |= dict(zip(PERPLEXITIES, (np.asarray(p, dtype=float) for p in perplexities), strict=True))
    texts = decode(tokenizer, tokens)
    columns |= text_columns(texts, legacy=legacy)
    others = tokens if sample is None else check_sequences(sample, length, len(tokenizer))
    semantic, textual = matches(
        texts,
        texts if sample is None else decode(tokenizer, others),
        decode(tokenizer, tokens[:, :prompt_len]),
        decode(tokenizer, others[:, :prompt_len]),
        embedder=embedder,
    )
    columns |= {"semantic_matches": semantic, "textual_matches": textual}
    table = pd.DataFrame({name: columns[name] for name in COLUMNS})
    check_features(table, COLUMNS)
    return table


def frequency_columns(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the six columns of token frequencies from (n, length) counts."""
    values = counts.astype(float)
    if not len(values):
        return {name: np.zeros(0) for name in FREQUENCIES}
    quartiles = np.percentile(values, [50, 25, 75], axis=1)
    return dict(zip(FREQUENCIES, (values.max(1), values.mean(1), values.min(1), *quartiles), strict=True))


def text_columns(texts: Sequence[str], *, legacy: bool = False) -> dict[str, np.ndarray]:
    """Returns the columns that come from the text alone."""
    found = [templating(text, legacy=legacy) for text in texts]
    incrementing = np.array([f.incrementing for f in found], dtype=bool)
    repeating = np.array([f.repeating for f in found], dtype=bool)
    return {
        "huffman_coding_length": np.array([shannon_code_length(text) for text in texts], dtype=float),
        "is_incrementing": incrementing,
        "is_repeating": repeating,
        "is_templating": incrementing | repeating,
    }


def check_features(table: pd.DataFrame, columns: Sequence[str] = PREDICTORS) -> None:
    """Checks that columns are there and hold finite numbers only.

    Raises:
        UserError: A column is missing, is not numeric, or has NaN or infinite values, with the row.
    """
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(f"The table of features has no column '{missing[0]}' (columns: {', '.join(map(str, table))}).")
    for name in columns:
        try:
            finite = np.isfinite(table[name].to_numpy(dtype=float))
        except (TypeError, ValueError) as error:
            raise UserError(f"The feature '{name}' holds something other than numbers.") from error
        if not finite.all():
            place = int(np.flatnonzero(~finite)[0])
            raise UserError(
                f"The feature '{name}' of row {place} is {table[name].iloc[place]}: mend or drop the "
                f"{int((~finite).sum())} rows in which it is no finite number."
            )
