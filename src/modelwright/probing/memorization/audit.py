"""The whole audit of models against a corpus: extraction, features, categories, predictive models, and a report.

Everything that takes time is kept in a working folder as it is made, so that an audit that was killed goes on there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from modelwright.errors import UserError
from modelwright.files import atomic_path, read_json, write_json
from modelwright.models.scoring import context_length
from modelwright.models.tokenizers import leading_ids
from modelwright.options import check_limit
from modelwright.probing.memorization.corpus import TokenCorpus, decode, tokenize_corpus
from modelwright.probing.memorization.duplicates import token_frequencies
from modelwright.probing.memorization.extraction import extractability, perplexities, read
from modelwright.probing.memorization.features import PERPLEXITIES, build_features
from modelwright.probing.memorization.neighbours import Embedder
from modelwright.probing.memorization.taxonomy import DUPLICATE_THRESHOLD, categorize
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Sequences whose results are kept in one file.
_BLOCK = 4096
#: Sequences that are decoded with ``generate`` as well, to see that both tests agree.
CROSS_CHECKED = 200
#: Sequences in the random sample, unless a share is asked for: every sequence is compared with all of them.
SAMPLE = 20_000


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What is audited.

    Attributes:
        prompt_len: Tokens of the prompt.
        cont_len: Tokens of the continuation.
        every: None takes the beginning of each document; a number takes a sequence every so many tokens of it.
        limit: Most sequences, drawn at random; None takes all.
        sample: Share of the sequences that is the random sample R (the paper: 0.03); None takes all, up to
            :data:`SAMPLE`. Features are computed for it and for every memorised sequence.
        duplicate_threshold: Fewest duplicates of recitation.
        legacy: Templates and perplexities as the official code has them.
        seed: Of the draws.
    """

    prompt_len: int = 32
    cont_len: int = 32
    every: int | None = None
    limit: int | None = None
    sample: float | None = None
    duplicate_threshold: int = DUPLICATE_THRESHOLD
    legacy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: One is out of range.
        """
        if min(self.prompt_len, self.cont_len) < 1:
            raise UserError("The prompt and the continuation need at least 1 token each.")
        if self.sample is not None and not 0 < self.sample <= 1:
            raise UserError(f"The sample is {self.sample}: give a share above 0 and at most 1.")
        if self.every is not None and self.every < 1:
            raise UserError(f"A sequence every {self.every} tokens cannot be: give at least 1.")
        check_limit(self.limit)
        if self.seed < 0:
            raise UserError(f"The seed is {self.seed}: give 0 or more.")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_len + self.cont_len


@dataclass(frozen=True)
class Subject:
    """A model under study.

    Attributes:
        name: What it is called.
        load: Called at most once, when its turn comes; what it gives is let go afterwards.
        version: Tells its weights from others of that name, so that kept scores are not those of other weights.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    version: str = ""

    @property
    def key(self) -> str:
        """Name of the folder of its scores."""
        return hashlib.sha256(f"{self.name}\0{self.version}".encode()).hexdigest()[:16]


class Audit:
    """An audit in a working folder.

    Args:
        texts: Documents of the corpus; they are read only if they are not in the folder already.
        tokenizer: The models' tokenizer.
        folder: Keeps tokens and scores; the same corpus and options continue there.
        options: What is audited.
        fingerprint: Of the corpus and of whatever else makes results another run's.
        progress: Where to show progress.
        force: Throw away what an audit with other options left in the folder.

    Raises:
        UserError: The folder holds an audit of another kind, or no document is long enough.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path,
        options: AuditOptions,
        *,
        fingerprint: str = "",
        progress: Progress | None = None,
        force: bool = False,
    ) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.folder, self.progress = Path(folder), progress or Silent()
        #: What the tokenizer puts before a text, and so what models with a beginning token expect before a prompt.
        self.leading = leading_ids(tokenizer)
        plan = {"fingerprint": fingerprint, "leading": self.leading, **_chosen(options)}
        _check_plan(self.folder, plan, force)
        tokens = self.folder / "tokens"
        if tokens.exists():
            self.corpus = TokenCorpus.open(tokens)
            self.progress.message("The corpus was tokenised before.")
        else:
            self.corpus = tokenize_corpus(texts, tokenizer, tokens, progress=self.progress)
        places = self.corpus.places(options.length, options.every)
        if not len(places.start):
            shutil.rmtree(self.folder)  # nothing in it is of use to a command that asks for less
            raise UserError(
                f"No document of the corpus has {options.length} tokens: give longer ones, or a shorter prompt and "
                f"continuation."
            )
        generator = np.random.default_rng(options.seed)
        count = len(places.start)
        chosen = np.arange(count)
        if options.limit is not None and options.limit < count:
            chosen = np.sort(generator.choice(count, options.limit, replace=False))
        self.places = type(places)(*(values[chosen] for values in places))
        share = min(1.0, SAMPLE / len(chosen)) if options.sample is None else options.sample
        self.in_sample = generator.random(len(chosen)) < share
        if not self.in_sample.any():
            self.in_sample[generator.integers(len(chosen))] = True

    def extract(self, subject: Subject, *, batch_size: int = 64) -> dict[str, np.ndarray]:
        """Reads all sequences with a model; blocks that were read before are taken from the folder.

        Returns:
            ``score``, ``prompt_perplexity``, ``continuation_perplexity``, ``sequence_perplexity``: (sequences,)
            float64.

        Raises:
            UserError: The model's vocabulary or context is too small.
        """
        total = len(self.places.start)
        folder = self.folder / "scores" / subject.key
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, total, _BLOCK)
        files = [folder / f"{start // _BLOCK:06d}.npz" for start in starts]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        checked = folder / "checked.json"
        self.progress.start(f"extract: {subject.name}", total)
        self.progress.advance(sum(min(_BLOCK, total - i * _BLOCK) for i in range(len(files)) if i not in missing))
        if missing or not checked.exists():
            model = subject.load()
            self._check(model, subject.name)
            for i in missing:
                self._read_block(model, self.places.start[starts[i] : starts[i] + _BLOCK], files[i], batch_size)
            write_json(checked, self._cross_check(model, files, batch_size))
        parts = [dict(np.load(file)) for file in files]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def cross_check(self, subject: Subject) -> dict[str, int]:
        """Returns on how many sequences teacher forcing and ``generate`` were compared, and on how many they differ."""
        return read_json(self.folder / "scores" / subject.key / "checked.json")

    def _read_block(self, model: PreTrainedModel, starts: np.ndarray, file: Path, batch_size: int) -> None:
        options = self.options
        found: list[list[np.ndarray]] = []
        for begin in range(0, len(starts), batch_size):
            tokens = self.corpus.sequences(starts[begin : begin + batch_size], options.length)
            reading = read(model, tokens, options.prompt_len, self.leading)
            parts = perplexities(reading.nats, options.prompt_len, tokens if options.legacy else None)
            found.append([reading.matches.mean(1), *parts])
            self.progress.advance(len(tokens))
        columns: Any = {
            name: np.concatenate([row[i] for row in found]) for i, name in enumerate(("score", *PERPLEXITIES))
        }
        with atomic_path(file) as partial, partial.open("wb") as stream:
            np.savez(stream, **columns)

    def _cross_check(self, model: PreTrainedModel, files: Sequence[Path], batch_size: int) -> dict[str, int]:
        scores = np.concatenate([np.load(file)["score"] for file in files])
        generator = np.random.default_rng(self.options.seed)
        # As many memorised sequences as others, where there are.
        rows = []
        for memorized in (True, False):
            some = np.flatnonzero((scores == 1) == memorized)
            rows.append(generator.permutation(some)[: CROSS_CHECKED // 2])
        chosen = np.concatenate(rows)
        tokens = self.corpus.sequences(self.places.start[chosen], self.options.length)
        sizes = self.options.prompt_len, self.options.cont_len
        generated = extractability(model, tokens, *sizes, "generate", leading=self.leading, batch_size=batch_size)
        return {"compared": len(chosen), "differ": int((generated.memorized != (scores[chosen] == 1)).sum())}

    def _check(self, model: PreTrainedModel, name: str) -> None:
        known = model.get_input_embeddings().weight.shape[0]
        if known < len(self.tokenizer):
            top = max(
                int(self.corpus.tokens[start : start + (1 << 24)].max())
                for start in range(0, len(self.corpus.tokens), 1 << 24)
            )
            if top >= known:
                raise UserError(f"The corpus has token {top}, but {name} knows {known}: it has another tokenizer.")
        longest, length = context_length(model), len(self.leading) + self.options.length
        if longest is not None and longest < length:
            raise UserError(f"Sequences of {length} tokens do not fit {name}, which takes {longest}.")

    def features(
        self, found: dict[str, dict[str, np.ndarray]], *, embedder: Embedder | None = None, workers: int = 1
    ) -> dict[str, pd.DataFrame]:
        """Builds each model's table: a row for each sequence of the sample, and for each that the model memorised.

        Args:
            found: Model's name to what :meth:`extract` gave.
            embedder: See :func:`~modelwright.probing.memorization.neighbours.semantic_matches`.
            workers: Processes that count duplicates.

        Returns:
            Model's name to a table: features, ``score``, ``memorized``, ``category``, ``in_sample``, ``sequence``,
            ``document``, ``offset``.
        """
        options = self.options
        memorized = {name: scores["score"] == 1 for name, scores in found.items()}
        needed = np.flatnonzero(self.in_sample | np.any(list(memorized.values()), axis=0))
        self.progress.start("features", len(needed))
        tokens = self.corpus.sequences(self.places.start[needed], options.length)
        sample = self.corpus.sequences(self.places.start[self.in_sample], options.length)
        counts = token_frequencies(self.corpus.tokens, len(self.tokenizer))
        first = next(iter(found.values()))
        shared = build_features(
            tokens,
            self.corpus,
            self.tokenizer,
            prompt_len=options.prompt_len,
            cont_len=options.cont_len,
            # Replaced below by each model's own.
            perplexities=tuple(first[name][needed] for name in PERPLEXITIES),  # type: ignore[arg-type]
            sample=sample,
            embedder=embedder,
            frequencies=counts,
            legacy=options.legacy,
            workers=workers,
        )
        self.progress.advance(len(needed))
        shared["category"] = categorize(shared, options.duplicate_threshold)
        shared["in_sample"] = self.in_sample[needed]
        shared["sequence"] = needed
        shared["document"] = self.places.document[needed]
        shared["offset"] = self.places.offset[needed]
        tables = {}
        for name, scores in found.items():
            table = shared.copy()
            for column in ("score", *PERPLEXITIES):
                table[column] = scores[column][needed]
            table["memorized"] = memorized[name][needed]
            tables[name] = table[table["in_sample"] | table["memorized"]].reset_index(drop=True)
        return tables

    def texts(self, sequences: Any) -> list[tuple[str, str]]:
        """Returns prompt and continuation of sequences, by their number."""
        starts = self.places.start[np.asarray(sequences, dtype=int)]
        tokens = self.corpus.sequences(starts, self.options.length)
        prompts = decode(self.tokenizer, tokens[:, : self.options.prompt_len])
        return list(zip(prompts, decode(self.tokenizer, tokens[:, self.options.prompt_len :]), strict=True))


def _chosen(options: AuditOptions) -> dict[str, Any]:
    # What categories and features are made of later leaves tokens and scores as they are.
    kept = dataclasses.asdict(options)
    return {k: v for k, v in kept.items() if k not in ("duplicate_threshold", "sample")}


def _check_plan(folder: Path, plan: dict[str, Any], force: bool) -> None:
    file = folder / "plan.json"
    plan = json.loads(json.dumps(plan))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but unfinished work is kept there: move it, or choose another output.")
    if folder.exists() and (not file.exists() or read_json(file) != plan):
        # A plan alone is of a corpus that could not be read: there is nothing to lose.
        if not force and any(entry != file for entry in folder.iterdir()):
            raise UserError(
                f"{folder} holds an unfinished audit with other options or another corpus: repeat that command "
                f"to finish it, or give --force."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, plan)
