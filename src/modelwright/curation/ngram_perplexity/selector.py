"""Documents with the lowest perplexity under an n-gram model of a reference."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np

from modelwright.curation.overlap import HeldOut
from modelwright.curation.select import token_counter
from modelwright.curation.selector import SelectorMixin
from modelwright.errors import UserError
from modelwright.models.ngram_scorer import NGramScorer
from modelwright.options import Arg

if TYPE_CHECKING:
    import datasets


@dataclass(kw_only=True)
class PerplexitySelector(SelectorMixin):
    """Scores a document by the mean log10 probability of its words under an n-gram model of the target.

    The perplexity is ``10 ** -score``. Words are what white space separates; the end of the document counts as one. Low
    perplexity is a matter of n-grams only: short, repetitive and template-like documents have it, so documents of less
    than ``min_tokens`` words are dropped, and duplicates should be (``dedup``).
    """

    order: Annotated[int, Arg("Length of the longest n-grams, 2 to 6.")] = 5
    min_tokens: Annotated[int, Arg("Drop documents with fewer words than this.")] = 32
    lowercase: Annotated[bool, Arg("Read target and pool in lower case.")] = False
    model: Annotated[str | None, Arg("Use this model (saved, or KenLM's ARPA or binary) instead of a target.")] = None
    backend: Annotated[Literal["python", "kenlm"], Arg("Who looks the n-grams up.")] = "python"

    # A saved model needs no target; `fit` refuses to have neither.
    needs_target: ClassVar[bool] = False
    score_name: ClassVar[str] = "log10_probability"

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise UserError(f"min_tokens must not be negative, but is {self.min_tokens}.")
        if not 2 <= self.order <= 6:
            raise UserError(f"order must lie between 2 and 6, not {self.order}.")
        self._scorer: NGramScorer | None = None

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> Self:
        """Estimates the model from the target, or reads the saved one.

        Raises:
            UserError: There is neither target nor model, or the target has no word.
        """
        if self.model is not None:
            self._scorer = NGramScorer.load(self.model, self.backend)
        elif not target:
            raise UserError("Perplexity needs a reference: give texts of the wanted kind (--target), or a saved model.")
        else:
            self._scorer = NGramScorer(self.order, self.backend).fit(self._read(target))
        return self

    def use(self, scorer: NGramScorer) -> Self:
        """Takes a scorer that has its reference already, instead of :meth:`fit`."""
        self._scorer = scorer
        return self

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Returns the mean log10 probability a token: float64, shape ``(len(texts),)``; NaN where dropped.

        Raises:
            UserError: ``fit`` was not called.
        """
        if self._scorer is None:
            raise UserError("The perplexity has no reference yet: call fit first.")
        found = self._scorer.scores(list(self._read(texts)), workers)
        return np.where(
            found.tokens - 1 >= max(1, self.min_tokens), found.log_probability / np.maximum(found.tokens, 1), np.nan
        )

    def details(self) -> dict[str, Any]:
        """Returns the sizes of the model and where discounts were not to be had."""
        model = self._scorer.model if self._scorer else None
        if model is None:
            return {}
        return {
            "ngrams": model.sizes,
            "discounts": [list(d) for d in model.discounts],
            "fallback_discounts_of_orders": list(model.fallback),
        }

    def _read(self, texts: Iterable[str]) -> Iterable[str]:
        return (text.lower() for text in texts) if self.lowercase else texts


def select_lowest_perplexity(
    pool: Iterable[str] | datasets.Dataset,
    scorer: NGramScorer,
    *,
    target_tokens: int,
    tokenizer: Any,
    min_tokens: int = 32,
    dedup: bool = True,
    heldout: HeldOut | None = None,
    strict: bool = False,
    text_column: str = "text",
    workers: int = 1,
) -> datasets.Dataset:
    """Takes the documents of lowest perplexity until the next one would exceed ``target_tokens``.

    The choice does not depend on the order of the pool: documents of equal perplexity follow the hash of their text.

    Args:
        pool: Texts, or a dataset with a column of them.
        scorer: Fitted on the reference.
        target_tokens: Tokens of ``tokenizer`` to take, without special ones.
        tokenizer: Hugging Face tokenizer of the model that will be trained, or its path or hub id.
        min_tokens: Fewest such tokens of a document.
        dedup: Keep only one of documents with the same words.
        heldout: Documents that share an n-gram with these are left out.
        strict: Raise, where the pool has fewer tokens, instead of warning.
        text_column: Column of the text.
        workers: Threads.

    Returns:
        The rows by rank, with the columns ``ppl``, ``n_tokens`` and ``rank`` (1 = lowest). Texts without a word have no
        perplexity; they are left out, and a warning says how many.

    Raises:
        UserError: Nothing qualifies, the best document alone is longer, or (``strict``) the pool is too small.
    """
    if target_tokens < 1:
        raise UserError(f"target_tokens must be at least 1, not {target_tokens}.")
    import datasets

    if not isinstance(pool, datasets.Dataset):
        pool = datasets.Dataset.from_dict({text_column: list(pool)})
    count = token_counter(tokenizer)
    texts = pool[text_column]
    lengths = np.array(count(texts) if len(texts) else [], dtype=np.int64)
    words = np.array([bool(text.split()) for text in texts], dtype=bool)
    if blank := int((~words).sum()):
        warnings.warn(f"{blank:,} documents without a word are left out.", stacklevel=2)
    keep = words & (lengths >= min_tokens)
    if heldout is not None:
        keep &= np.array([not heldout.shared(text) for text in texts], dtype=bool)
    if not keep.any():
        raise UserError(
            f"None of the {len(texts)} documents has {min_tokens} tokens and no held-out text in it: lower min_tokens."
        )
    order = sorted(np.flatnonzero(keep).tolist(), key=lambda i: _key(texts[i]))
    ranked = pool.select(order).add_column("n_tokens", lengths[order])
    selector = PerplexitySelector(min_tokens=0).use(scorer)
    chosen = selector.select(
        ranked,
        token_budget=target_tokens,
        tokenizer=tokenizer,
        dedup=dedup,
        text_column=text_column,
        workers=workers,
    )
    perplexity = 10.0 ** -np.array(chosen[selector.score_name])
    chosen = chosen.remove_columns(selector.score_name).add_column("ppl", perplexity)
    got, longest = sum(chosen["n_tokens"]), int(lengths.max())
    if got <= target_tokens - longest:
        message = (
            f"The pool has only {got:,} tokens that qualify, fewer than the {target_tokens:,} asked for: give more "
            f"data, or ask for less."
        )
        if strict:
            raise UserError(message)
        warnings.warn(message, stacklevel=2)
    return chosen


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
