"""One model's losses by token frequency, beside another's and over its own past: what `probe token-loss` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright.errors import UserError
from modelwright.options import check_limit
from modelwright.probing.fair_lm.bins import FrequencyBins, frequency_bins
from modelwright.probing.fair_lm.counts import TokenCounts
from modelwright.probing.fair_lm.report import TokenLossReport
from modelwright.probing.fair_lm.speed import learning_speed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_options(options: Any) -> None:
    """Refuses options of the verb that make no sense, before any work.

    Raises:
        UserError: The first of them.
    """
    if (options.counts is None) == (not options.train_data):
        raise UserError(
            "Say how frequent tokens were in training: give --counts (from `modelwright probe token-counts`) or "
            "--train-data, and not both."
        )
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}.")
    check_limit(options.limit)
    if options.bootstrap < 0:
        raise UserError(f"--bootstrap must be 0 or more, not {options.bootstrap}.")
    if options.base < 2:
        raise UserError(f"--base must be at least 2, not {options.base}.")
    if options.types is not None and options.types.suffix != ".parquet":
        raise UserError(f"{options.types} must end in .parquet.")


def audit(
    report: TokenLossReport,
    counts: TokenCounts,
    *,
    base: int = 3,
    bootstrap: int = 0,
    against: TokenLossReport | None = None,
    earlier: Sequence[TokenLossReport] = (),
) -> dict[str, Any]:
    """Returns what is said of a model, JSON-able.

    Args:
        report: Its losses.
        counts: Of the training corpus.
        base: Ratio of the bins' edges.
        bootstrap: Resamples of types for intervals.
        against: Losses of a model to compare with, on the same data.
        earlier: Losses of earlier checkpoints on the same data, oldest first.

    Raises:
        UserError: The reports are of other vocabularies or data, or the counts of another vocabulary.
    """
    bins = frequency_bins(counts.resized(report.vocab_size), base)
    found = report.summary(bins, bootstrap=bootstrap)
    if against is not None:
        found["against"] = compare(report, against, bins)
    if earlier:
        past = [*earlier, report]
        found["learning_speed"] = {}
        for method in ("auc", "minmax"):
            speed = learning_speed(past, method)
            by_bin = {bins.label(number): value for number, value in speed.by_bin(bins).items()}
            found["learning_speed"][method] = {"mean": speed.mean, "gap": speed.gap(bins), "bins": by_bin}
    return found


def compare(report: TokenLossReport, reference: TokenLossReport, bins: FrequencyBins) -> dict[str, Any]:
    """Returns how a model's losses differ from a reference's: the paper's deltas and their ratio.

    Args:
        report: The model's.
        reference: Such as the same model without weight decay.
        bins: Of the training corpus.

    Returns:
        ``average`` and ``balanced`` of the reference, ``delta_average``, ``delta_balanced``, their ``delta_ratio``
        (None where the average did not change), and for each bin the loss of both and the ratio.

    Raises:
        UserError: The reports are of other vocabularies or data.
    """
    if reference.vocab_size != report.vocab_size:
        raise UserError(
            f"Models of vocabularies of {report.vocab_size} and {reference.vocab_size} types cannot be compared type "
            f"by type."
        )
    if not np.array_equal(reference.counts, report.counts):
        raise UserError("The models were measured on different data: measure both on the same.")
    average, balanced = report.average - reference.average, report.balanced - reference.balanced
    rows = [
        {
            "label": mine.label,
            "types": mine.types,
            "loss": mine.loss,
            "reference": other.loss,
            "ratio": mine.loss / other.loss if other.loss else None,
        }
        for mine, other in zip(report.by_bin(bins), reference.by_bin(bins), strict=True)
    ]
    return {
        "average": reference.average,
        "balanced": reference.balanced,
        "delta_average": average,
        "delta_balanced": balanced,
        "delta_ratio": balanced / average if average else None,
        "bins": rows,
    }


def write_types(
    path: Path,
    report: TokenLossReport,
    counts: TokenCounts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: int = 3,
    against: TokenLossReport | None = None,
) -> None:
    """Writes a row for each type that occurred: id, token, training count, bin, occurrences, loss, accuracy.

    It is a file of :meth:`~modelwright.probing.fair_lm.report.TokenLossReport.to_parquet` with more columns, and is
    read as one. A single rare type says little: mind its occurrences.
    """
    import pyarrow
    from pyarrow import parquet

    report.to_parquet(path, force=True)
    table = parquet.read_table(path)
    metadata = table.schema.metadata
    bins = frequency_bins(counts.resized(report.vocab_size), base)
    at = table["token_id"].to_numpy()
    names = tokenizer.convert_ids_to_tokens(at.tolist())
    columns = {"token": names, "train_count": bins.counts[at], "bin": [bins.label(b) for b in bins.index[at]]}
    columns["mean_loss"] = report.per_token[at]
    if report.correct is not None:
        columns["accuracy"] = report.correct[at] / report.counts[at]
    if against is not None:
        columns["mean_loss_against"] = against.per_token[at]
    for name, values in columns.items():
        table = table.append_column(name, pyarrow.array(values))
    parquet.write_table(table.replace_schema_metadata(metadata), path)
