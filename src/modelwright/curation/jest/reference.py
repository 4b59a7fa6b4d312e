"""The frozen reference model's embeddings of the data, computed once: then the reference costs nothing in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright.curation.jest.pool import PoolEmbeddings, embed_pool, embeddings_folder, write_pool
from modelwright.curation.jest.selection import REFERENCE_COLUMNS
from modelwright.errors import UserError
from modelwright.files import check_output
from modelwright.progress import Progress
from modelwright.training.contrastive.encoders import PairEncoder, load_pair_encoder, pair_encoder
from modelwright.training.contrastive.pairs import Pairs, pairs_of, read_pairs

if TYPE_CHECKING:
    from datasets import Dataset


def cache_reference_embeddings(
    data: Pairs | Dataset,
    model: Any,
    processor: Any = None,
    output: str | Path | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Pairs:
    """Adds a reference model's embeddings to pairs, as columns that training and selection read.

    The columns are ``ref_query_embeds`` and ``ref_key_embeds`` (d float32 each), ``ref_scale`` and ``ref_bias`` (NaN
    for none); columns of these names are replaced. A file holds the model's fingerprint in its metadata too
    (:func:`~modelwright.curation.jest.pool.read_metadata`).

    Args:
        data: ``Pairs``, or a ``datasets.Dataset`` with the usual columns of pairs.
        model: The reference: a ``PairEncoder``, a model such as ``SiglipModel``, or a folder or hub id.
        processor: The model's processor or tokenizer, for a bare model.
        output: Parquet file to write; None keeps the columns in memory. A run that was cut short goes on where it was:
            embeddings are kept in ``<output>.embedding`` meanwhile.
        batch_size: Pairs at a time.
        workers: Processes that read and prepare pairs.
        force: Whether to replace an existing output.
        progress: Shows what is being done.

    Returns:
        The pairs with the new columns.

    Raises:
        UserError: The output exists or is no Parquet file, a pair cannot be read, or model and pairs do not fit.
    """
    pairs = data if isinstance(data, Pairs) else pairs_of(data)
    if output is not None:
        output = check_parquet(output, force)
    encoder = as_encoder(model, processor)
    check_kind(encoder, pairs, "reference")
    if output is None:
        return with_columns(
            pairs, embed_pool(encoder, pairs, batch_size=batch_size, workers=workers, progress=progress)
        )
    with embeddings_folder(output) as folder:
        found = embed_pool(
            encoder,
            pairs,
            folder=folder,
            label="reference",
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
        about = {"reference": describe(found)}
        write_pool(pairs, output, found.columns, metadata=about, force=force, progress=progress)
    fields = pairs._parts[0].fields
    return read_pairs(output, query_field=fields.query, key_field=fields.key)


def describe(embeddings: PoolEmbeddings) -> dict[str, Any]:
    """Returns what a file says of the model that embedded it."""
    return {
        "fingerprint": embeddings.fingerprint,
        "scale": embeddings.scale,
        "bias": embeddings.bias,
        "width": embeddings.queries.shape[1],
    }


def with_columns(pairs: Pairs, embeddings: PoolEmbeddings) -> Pairs:
    """Returns pairs with a reference's columns in memory."""
    import datasets
    import pyarrow

    parts = []
    split = {number: (local, positions) for number, _, local, positions in pairs._split(np.arange(len(pairs)))}
    for number, part in enumerate(pairs._parts):
        local, positions = split.get(number, (np.empty(0, dtype=np.int64),) * 2)
        # Rows of the source that are not among the pairs get those of the first pair, and nobody sees them.
        where = np.zeros(len(part.data), dtype=np.int64)
        where[local] = positions
        new = datasets.Dataset(pyarrow.table(embeddings.columns(where)))
        kept = part.data.remove_columns([n for n in REFERENCE_COLUMNS if n in part.data.column_names])
        parts.append(dataclasses.replace(part, data=datasets.concatenate_datasets([kept, new], axis=1)))
    return Pairs(parts, pairs._rows)


def cached_embeddings(pairs: Pairs) -> PoolEmbeddings | None:
    """Returns the reference's embeddings that pairs hold as columns; None if they hold none.

    Raises:
        UserError: Only some of the columns are there, or the rows come from several references.
    """
    there = [name for name in REFERENCE_COLUMNS if name in pairs.column_names]
    if not there:
        return None
    if len(there) < len(REFERENCE_COLUMNS):
        missing = next(name for name in REFERENCE_COLUMNS if name not in there)
        raise UserError(
            f"The pairs have the column {there[0]} but not {missing}: cache the reference's embeddings again."
        )
    queries, keys, scales, biases = (pairs.column(name) for name in REFERENCE_COLUMNS)
    for name, values in (("ref_scale", scales), ("ref_bias", biases)):
        if not (np.isnan(values).all() or (values == values[0]).all()):
            raise UserError(f"The column {name} has different values: the rows were embedded by different references.")
    bias = None if np.isnan(biases[0]) else float(biases[0])
    return PoolEmbeddings(queries.astype(np.float32), keys.astype(np.float32), float(scales[0]), bias, "cached")


def as_encoder(model: Any, processor: Any = None, device: str | None = None) -> PairEncoder:
    """Returns a model of any form as an encoder of pairs, in evaluation mode.

    Raises:
        UserError: A bare model without its processor, or no such model.
    """
    if isinstance(model, PairEncoder):
        return model.eval()
    if isinstance(model, str | Path):
        return load_pair_encoder(model, device=device).eval()
    if processor is None:
        raise UserError(f"A {type(model).__name__} needs its processor or tokenizer: give it too.")
    return pair_encoder(model, processor).eval()


def check_kind(encoder: PairEncoder, pairs: Pairs, name: str) -> None:
    """Raises :class:`UserError` if a model embeds another kind of queries than the pairs have."""
    if encoder.kind != pairs.kind:
        raise UserError(f"The {name} embeds {encoder.kind} pairs and these are {pairs.kind}: give a model for them.")


def check_parquet(path: str | Path, force: bool) -> Path:
    """Refuses, before any work, an output that exists or is no Parquet file."""
    path = check_output(path, force)
    if path.suffix.lower() != ".parquet":
        raise UserError(f"{path} must end in .parquet: pairs are written with pictures and vectors.")
    return path
