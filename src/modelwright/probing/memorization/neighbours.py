"""How many texts of a corpus mean nearly the same as a sequence, and how many of those are nearly the same letters.

*Semantic matches*: texts whose embeddings have a cosine of at least 0.8. *Textual matches*: those among them whose
prompt is fewer than 20 edits away, but not the same. A sequence that is itself in the sample is a semantic match of
its own, as in the official code, and never a textual one.

The paper embeds with all-MiniLM-L6-v2. An embedder here is any function from texts to an array; one that needs no
download, hashed character n-grams, is the default: its matches are texts that look alike, so paraphrases are missed.

Source: section 3 of the paper (official names: 0_8_snowclones, 0_8_templates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright.errors import UserError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Texts to (n, dimensions) numbers, of any length; they are normalised here.
Embedder = Callable[[Sequence[str]], np.ndarray]
#: Smallest cosine of a semantic match, and the number of edits from which on there is no textual one.
COSINE, EDITS = 0.8, 20
_BLOCK = 1024


class NgramEmbedder:
    """Hashed character n-grams, weighted by TF-IDF: the embedder that is always there. Needs scikit-learn.

    Args:
        texts: A sample of the corpus, for the document frequencies.
        dimensions: Of the embedding; n-grams share them by hash.
        ngrams: Shortest and longest n-gram, within words.
    """

    def __init__(self, texts: Sequence[str], dimensions: int = 1024, ngrams: tuple[int, int] = (3, 5)) -> None:
        require("sklearn", "probing", "embedding texts by their n-grams")
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        self._hash = HashingVectorizer(analyzer="char_wb", ngram_range=ngrams, n_features=dimensions, norm=None)
        self._weigh = TfidfTransformer(sublinear_tf=False)
        self._weigh.fit(abs(self._hash.transform(list(texts))))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (n, dimensions) float32."""
        return self._weigh.transform(self._hash.transform(list(texts))).toarray().astype(np.float32)


class ModelEmbedder:
    """The mean of a causal model's last hidden states: what the audited model itself takes for alike.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_length: Tokens of a text that are read.
        batch_size: Texts at once; the model makes logits of all their tokens.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 64, batch_size: int = 32
    ) -> None:
        self.model, self.tokenizer, self.max_length, self.batch_size = model, tokenizer, max_length, batch_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (n, hidden size) float32."""
        starts = range(0, len(texts), self.batch_size)
        return np.concatenate([self._embed(texts[start : start + self.batch_size]) for start in starts])

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        from modelwright.models.tokenizers import encode

        rows = [row[: self.max_length] or [0] for row in encode(self.tokenizer, list(texts))]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        with torch.no_grad():
            out = self.model(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                output_hidden_states=True,
                use_cache=False,
            )
        states = out.hidden_states[-1].float().cpu()
        return ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()


def sentence_embedder(name: str) -> Embedder:
    """Returns a model of sentence-transformers, by its folder or hub id, as an embedder.

    Raises:
        UserError: The package is not there, or no such model.
    """
    library = require("sentence_transformers", "curation", "embedding with a sentence-transformers model")
    try:
        model = library.SentenceTransformer(name)
    except Exception as error:  # of many families, all of which mean that there is no such model
        raise UserError(f"'{name}' is no model of sentence-transformers that can be loaded here.") from error
    return lambda texts: model.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)


def semantic_matches(
    texts: Sequence[str], sample: Sequence[str], embedder: Embedder | None = None, *, cosine: float = COSINE
) -> np.ndarray:
    """Counts texts of a sample that mean nearly the same.

    Args:
        texts: Decoded sequences.
        sample: Decoded sequences of the corpus, of which matches are counted.
        embedder: Texts to vectors; None takes :class:`NgramEmbedder`, fitted on the sample.
        cosine: Smallest cosine of a match.

    Returns:
        (texts,) int64.
    """
    return matches(texts, sample, embedder=embedder, cosine=cosine)[0]


def textual_matches(
    texts: Sequence[str],
    sample: Sequence[str],
    prompts: Sequence[str],
    sample_prompts: Sequence[str],
    embedder: Embedder | None = None,
    *,
    cosine: float = COSINE,
    edits: int = EDITS,
) -> np.ndarray:
    """Counts semantic matches whose prompt is between 1 and ``edits - 1`` edits (Levenshtein) away.

    Args:
        texts: Decoded sequences.
        sample: Decoded sequences of the corpus.
        prompts: Decoded prompts of ``texts``; one with a character outside ASCII has no matches.
        sample_prompts: Decoded prompts of ``sample``.
        embedder: See :func:`semantic_matches`.
        cosine: Smallest cosine of a semantic match.
        edits: Number of edits from which on prompts differ too much.

    Returns:
        (texts,) int64.
    """
    both = matches(texts, sample, prompts, sample_prompts, embedder=embedder, cosine=cosine, edits=edits)
    return both[1]


def matches(
    texts: Sequence[str],
    sample: Sequence[str],
    prompts: Sequence[str] | None = None,
    sample_prompts: Sequence[str] | None = None,
    *,
    embedder: Embedder | None = None,
    cosine: float = COSINE,
    edits: int = EDITS,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns semantic and textual matches, (texts,) int64 each; the latter are 0 where no prompts are given.

    Raises:
        UserError: The embedder gives something other than a row of finite numbers for each text.
    """
    semantic = np.zeros(len(texts), dtype=np.int64)
    textual = np.zeros(len(texts), dtype=np.int64)
    if not len(texts) or not len(sample):
        return semantic, textual
    embed = embedder or NgramEmbedder(sample)
    corpus = _embedded(embed, sample)
    if prompts is not None:
        distance = require("rapidfuzz.distance.Levenshtein", "probing", "edit distances").distance
    for start, block in _blocks(texts):
        # Rounding must not part a text from itself.
        close = _embedded(embed, block) @ corpus.T >= cosine - 1e-6
        semantic[start : start + len(block)] = close.sum(1)
        if prompts is None or sample_prompts is None:
            continue
        for row in range(len(block)):
            prompt = prompts[start + row]
            if not prompt.isascii():
                continue
            # Copies of one prompt are compared once.
            others = Counter(sample_prompts[i] for i in np.flatnonzero(close[row]).tolist())
            textual[start + row] = sum(
                count for other, count in others.items() if 0 < distance(prompt, other, score_cutoff=edits - 1) < edits
            )
    return semantic, textual


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    for start in range(0, len(texts), _BLOCK):
        yield start, texts[start : start + _BLOCK]


def _embedded(embed: Embedder, texts: Sequence[str]) -> Any:
    parts = []
    for _, block in _blocks(texts):
        part = np.asarray(embed(block), dtype=np.float32)
        if part.ndim != 2 or len(part) != len(block) or not np.isfinite(part).all():
            raise UserError(f"The embedder must give a row of finite numbers for each text, not shape {part.shape}.")
        parts.append(part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12))
    return np.concatenate(parts)
