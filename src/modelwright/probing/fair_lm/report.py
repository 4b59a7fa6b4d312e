"""What a tracker found: loss and accuracy per token type, averaged over occurrences and over types."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.errors import UserError
from modelwright.files import atomic_path
from modelwright.probing.fair_lm.bins import FrequencyBins, check_counts

#: Numbers that a bootstrap holds at once.
_BOOTSTRAP_CHUNK = 1 << 22


@dataclass(frozen=True)
class BinRow:
    """Types of one frequency bin.

    Attributes:
        bin: Number of the bin; 0 holds types that are not in the training corpus.
        label: Its training counts, such as ``[3, 9)``.
        types: Types of the bin that were seen as targets.
        occurrences: Their occurrences.
        share: Occurrences over those of all bins.
        loss: Mean over the bin's types of the type's mean loss, nats.
        accuracy: Likewise; None where predictions were not given.
        low: Lower end of the 95% interval of ``loss``, by a bootstrap over types; None without one.
        high: Upper end.
    """

    bin: int
    label: str
    types: int
    occurrences: int
    share: float
    loss: float
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class TokenLossReport:
    """Loss by token type. A type counts where it is the target, not where it is input.

    Attributes:
        loss: (V,) float64, sum of the losses of each type in nats.
        counts: (V,) int64, occurrences as a target.
        correct: (V,) int64, occurrences that had the largest logit; None where predictions were not given.
        tokenizer: Fingerprint of the tokenizer, where it is known.
    """

    loss: np.ndarray
    counts: np.ndarray
    correct: np.ndarray | None = None
    tokenizer: str | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.counts)

    @property
    def seen(self) -> np.ndarray:
        """(V,) bool, the types that occurred: only they enter what is averaged over types."""
        return self.counts > 0

    @property
    def types(self) -> int:
        """Number of types that occurred."""
        return int(self.seen.sum())

    @property
    def unseen(self) -> int:
        """Number of types that did not occur."""
        return self.vocab_size - self.types

    @property
    def tokens(self) -> int:
        """Number of targets."""
        return int(self.counts.sum())

    @property
    def per_token(self) -> np.ndarray:
        """(V,) float64, ``L_v``, the mean loss of each type in nats; NaN for types that did not occur."""
        return _ratio(self.loss, self.counts)

    @property
    def average(self) -> float:
        """``L_avg``, the mean over occurrences in nats, which everyone logs."""
        return math.fsum(self.loss) / self.tokens

    @property
    def balanced(self) -> float:
        """``L_bal``, the mean of ``L_v`` over the types that occurred, in nats."""
        return math.fsum(self.per_token[self.seen]) / self.types

    @property
    def perplexity(self) -> float:
        """``exp`` of :attr:`average`."""
        return _exp(self.average)

    @property
    def balanced_perplexity(self) -> float:
        """``exp`` of :attr:`balanced`, the paper's "per-token perplexity"."""
        return _exp(self.balanced)

    @property
    def accuracy(self) -> float | None:
        """Share of occurrences that had the largest logit."""
        return None if self.correct is None else int(self.correct.sum()) / self.tokens

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean over types of the share of their occurrences that had the largest logit."""
        if self.correct is None:
            return None
        return math.fsum(_ratio(self.correct, self.counts)[self.seen]) / self.types

    def by_bin(self, bins: FrequencyBins, *, bootstrap: int = 0, seed: int = 0) -> list[BinRow]:
        """Returns the bins that have types, from rare to frequent; every type that occurred is in exactly one.

        Args:
            bins: Of the training corpus, also for losses on held-out text.
            bootstrap: Resamples of each bin's types for the interval of its loss; 0 for none.
            seed: Seed of the resamples.

        Raises:
            UserError: The bins are of another vocabulary.
        """
        self._check_length(len(bins.index), "The frequency bins are")
        losses = self.per_token
        accuracies = None if self.correct is None else _ratio(self.correct, self.counts)
        rows = []
        for number in range(len(bins)):
            inside = self.seen & (bins.index == number)
            if not inside.any():
                continue
            occurrences = int(self.counts[inside].sum())
            low, high = interval(losses[inside], bootstrap, seed) if bootstrap else (None, None)
            rows.append(
                BinRow(
                    bin=number,
                    label=bins.label(number),
                    types=int(inside.sum()),
                    occurrences=occurrences,
                    share=occurrences / self.tokens,
                    loss=float(losses[inside].mean()),
                    accuracy=None if accuracies is None else float(accuracies[inside].mean()),
                    low=low,
                    high=high,
                )
            )
        return rows

    def slope(self, counts: Any) -> float | None:
        """Returns the least-squares slope of ``L_v`` on ``ln n_v``, each type once; None with fewer than two counts.

        Args:
            counts: (V,) training counts ``n_v``; types that occurred here but not in training are left out.

        Raises:
            UserError: The counts are of another vocabulary.
        """
        counts = check_counts(counts)
        self._check_length(len(counts), "The training counts are")
        inside = self.seen & (counts > 0)
        x = np.log(counts[inside])
        if len(x) < 2 or np.ptp(x) == 0:
            return None
        x = x - x.mean()
        return float(x @ self.per_token[inside] / (x @ x))

    def gap(self, bins: FrequencyBins) -> float | None:
        """Returns the loss of the rarest bin minus that of the most frequent one; None with fewer than two bins.

        Types that are not in the training corpus do not count: they are not rare but unknown.
        """
        return bin_gap(self.by_bin(bins))

    def summary(self, bins: FrequencyBins | None = None, *, bootstrap: int = 0) -> dict[str, Any]:
        """Returns everything but the types themselves as JSON-able numbers.

        Args:
            bins: Adds ``slope``, ``gap`` and the ``bins``.
            bootstrap: Resamples of types for the intervals; 0 for none.
        """
        found: dict[str, Any] = {
            "average": self.average,
            "balanced": self.balanced,
            "balanced_interval": list(interval(self.per_token[self.seen], bootstrap)) if bootstrap else None,
            "perplexity": _finite(self.perplexity),
            "balanced_perplexity": _finite(self.balanced_perplexity),
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "tokens": self.tokens,
            "types": self.types,
            "unseen_types": self.unseen,
        }
        if bins is not None:
            rows = self.by_bin(bins, bootstrap=bootstrap)
            found |= {"slope": self.slope(bins.counts), "gap": bin_gap(rows), "bins": [asdict(row) for row in rows]}
        return found

    def to_parquet(self, path: str | Path, force: bool = False) -> None:
        """Writes ``token_id``, ``loss`` (sum, nats), ``count`` and ``correct`` of the types that occurred.

        Raises:
            UserError: The file exists and ``force`` is off.
        """
        import pyarrow
        from pyarrow import parquet

        at = np.flatnonzero(self.seen)
        columns = {"token_id": at, "loss": self.loss[at], "count": self.counts[at]}
        if self.correct is not None:
            columns["correct"] = self.correct[at]
        about = json.dumps({"vocab_size": self.vocab_size, "tokenizer": self.tokenizer})
        table = pyarrow.table(columns).replace_schema_metadata({"modelwright.token_loss": about})
        with atomic_path(path, force) as partial:
            parquet.write_table(table, partial)

    @classmethod
    def from_parquet(cls, path: str | Path) -> TokenLossReport:
        """Reads what :meth:`to_parquet` wrote.

        Raises:
            UserError: The file is none of these.
        """
        table = read_table(path)
        about = (table.schema.metadata or {}).get(b"modelwright.token_loss")
        if about is None:
            raise UserError(f"{path} holds no losses by token type: write them with `modelwright probe token-loss`.")
        facts = json.loads(about)
        at = table["token_id"].to_numpy()

        def column(name: str, dtype: Any) -> np.ndarray:
            whole = np.zeros(facts["vocab_size"], dtype)
            whole[at] = table[name].to_numpy()
            return whole

        correct = column("correct", np.int64) if "correct" in table.column_names else None
        return cls(column("loss", np.float64), column("count", np.int64), correct, facts["tokenizer"])

    def _check_length(self, length: int, what: str) -> None:
        if length != self.vocab_size:
            raise UserError(
                f"{what} for {length} token types, but the losses are for {self.vocab_size}: they are of different "
                f"vocabularies."
            )


def bin_gap(rows: Iterable[BinRow]) -> float | None:
    """Returns the loss of the rarest bin of the training corpus minus that of the most frequent one."""
    known = [row for row in rows if row.bin > 0]
    return known[0].loss - known[-1].loss if len(known) > 1 else None


def interval(values: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float]:
    """Returns the 95% percentile interval of a mean, by drawing types again with replacement.

    Args:
        values: (n,) a number for each type.
        resamples: How often to draw.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    step = max(1, _BOOTSTRAP_CHUNK // len(values))
    means = np.concatenate(
        [
            values[generator.integers(0, len(values), (min(step, resamples - start), len(values)))].mean(1)
            for start in range(0, resamples, step)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def read_table(path: str | Path) -> Any:
    """Reads a whole Parquet file.

    Raises:
        UserError: It is missing, or no Parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist.")
    try:
        return parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is truncated or is not Parquet data ({str(error).splitlines()[0]}).") from error


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
