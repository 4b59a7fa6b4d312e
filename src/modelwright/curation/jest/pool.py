"""A pool of pairs beside training: embedded once, kept while that is unfinished, and written with further columns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modelwright.errors import UserError
from modelwright.files import atomic_path, read_json, write_json
from modelwright.progress import Progress, Silent
from modelwright.training.contrastive.batches import prepared
from modelwright.training.contrastive.encoded import Encoded

if TYPE_CHECKING:
    import pyarrow

    from modelwright.training.contrastive.encoders import PairEncoder
    from modelwright.training.contrastive.pairs import Pairs

#: Seconds between notes of how far embedding is.
_NOTED_EVERY = 20.0
_ROWS = 1024


@dataclass
class PoolEmbeddings:
    """A model's embeddings of all pairs of a pool.

    Attributes:
        queries: (n, d) float32, rows of length 1.
        keys: (n, d) float32, rows of length 1.
        scale: What multiplies the model's cosines.
        bias: What is added to them in the sigmoid loss; None for the softmax loss.
        fingerprint: Of the model (:func:`model_fingerprint`).
    """

    queries: np.ndarray
    keys: np.ndarray
    scale: float
    bias: float | None
    fingerprint: str

    def rows(self, indices: np.ndarray, device: torch.device | str = "cpu") -> Encoded:
        """Returns some of them."""
        queries, keys = (torch.from_numpy(np.asarray(side[indices])).to(device) for side in (self.queries, self.keys))
        bias = None if self.bias is None else torch.tensor(self.bias, device=device)
        return Encoded(queries, keys, None, torch.tensor(self.scale, device=device), bias)

    def columns(self, indices: np.ndarray) -> dict[str, pyarrow.Array]:
        """Returns the columns that training looks for: embeddings, scale and bias (NaN for none) in every row.

        Scale and bias stand in every row, so that rows of different references that were put together are noticed.
        """
        import pyarrow

        def vectors(side: np.ndarray) -> pyarrow.Array:
            flat = pyarrow.array(np.ascontiguousarray(side[indices]).reshape(-1))
            return pyarrow.FixedSizeListArray.from_arrays(flat, side.shape[1])

        bias = np.nan if self.bias is None else self.bias
        return {
            "ref_query_embeds": vectors(self.queries),
            "ref_key_embeds": vectors(self.keys),
            "ref_scale": pyarrow.array(np.full(len(indices), self.scale, dtype=np.float32)),
            "ref_bias": pyarrow.array(np.full(len(indices), bias, dtype=np.float32)),
        }


def model_fingerprint(encoder: PairEncoder) -> str:
    """Returns a hash (hex) of an encoder's weights, scale and bias."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def embeddings_folder(output: Path) -> Iterator[Path]:
    """Yields ``<output>.embedding``, which is kept for the next run if this one is killed or interrupted."""
    folder = output.with_name(output.name + ".embedding")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)  # what is mended is another pool
        raise
    shutil.rmtree(folder, ignore_errors=True)


def embed_pool(
    encoder: PairEncoder,
    pairs: Pairs,
    *,
    folder: Path | None = None,
    label: str = "embed",
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
) -> PoolEmbeddings:
    """Embeds all pairs with a frozen model in evaluation mode.

    Args:
        encoder: The model, where it is to run.
        pairs: The pool.
        folder: Where the embeddings are kept, so that a run that was cut short goes on; None keeps them in memory.
        label: What the progress calls it, and the name of the files.
        batch_size: Pairs at a time.
        workers: Processes that read and prepare pairs; 0 does it here.
        progress: Told of each pair.

    Raises:
        UserError: A pair cannot be read, or an embedding is not finite.
    """
    progress = progress or Silent()
    if batch_size < 1 or workers < 0:
        raise UserError(f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}.")
    encoder = encoder.eval()
    identity = {"model": model_fingerprint(encoder), "pairs": pairs.fingerprint()}
    count, done = len(pairs), 0
    stored: np.ndarray | None = None
    file, note = (folder / f"{label}.npy", folder / f"{label}.json") if folder else (None, None)
    if file is not None and note is not None and note.exists() and file.exists():
        found = read_json(note)
        if found.get("identity") == identity:
            stored, done = np.lib.format.open_memmap(file, mode="r+"), int(found["done"])
    progress.start(label, count)
    progress.advance(done)
    noted = time.monotonic()
    parts = (list(range(start, min(start + batch_size, count))) for start in range(done, count, batch_size))
    with torch.inference_mode():
        for batch in prepared(pairs, encoder.collator, parts, workers=workers):
            # Hard negatives are no part of a pair's score.
            batch = {n: v.to(encoder.device) for n, v in batch.items() if not n.startswith("negative_")}
            out = encoder(batch)
            rows = torch.stack([out.queries, out.keys]).float().cpu().numpy()
            if not np.isfinite(rows).all():
                raise UserError(
                    f"The model's embedding of one of the pairs {done} to {done + rows.shape[1] - 1} is not finite: "
                    f"the model has diverged, or the pair is broken."
                )
            if stored is None:
                shape = (2, count, rows.shape[2])
                stored = (
                    np.empty(shape, dtype=np.float32)
                    if file is None
                    else np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
                )
            stored[:, done : done + rows.shape[1]] = rows
            done += rows.shape[1]
            progress.advance(rows.shape[1])
            if note is not None and (done == count or time.monotonic() - noted > _NOTED_EVERY):
                stored.flush()  # type: ignore[attr-defined]  # before the note that says so
                write_json(note, {"identity": identity, "done": done})
                noted = time.monotonic()
    assert stored is not None
    with torch.no_grad():
        scale, bias = encoder.scale().item(), encoder.bias()
    return PoolEmbeddings(stored[0], stored[1], scale, None if bias is None else bias.item(), identity["model"])


def write_pool(
    pairs: Pairs,
    path: str | Path,
    columns: Callable[[np.ndarray], dict[str, pyarrow.Array]],
    *,
    indices: np.ndarray | None = None,
    added: Callable[[slice], dict[str, pyarrow.Array]] | None = None,
    metadata: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Writes pairs with all their columns and further ones to a Parquet file, a part at a time; whole or not at all.

    Images stay as they are. Paths of images that are relative to their source's folder become relative to the new
    file's.

    Args:
        pairs: The pairs.
        path: The new file.
        columns: From positions of pairs to further columns; they take the place of columns of the same name.
        indices: Which pairs, in the order wanted; None for all.
        added: From a part of ``indices`` to further columns.
        metadata: Kept in the file under ``modelwright``.
        force: Whether to replace an existing file.
        progress: Told of each pair.

    Returns:
        How many were written.

    Raises:
        UserError: The file exists, the disk is full, or the sources' columns differ in type.
    """
    import pyarrow
    from pyarrow import parquet

    path, progress = Path(path), progress or Silent()
    indices = np.arange(len(pairs)) if indices is None else np.asarray(indices)
    progress.start("write", len(indices))
    with atomic_path(path, force) as partial:
        writer = None
        try:
            for start in range(0, len(indices), _ROWS):
                where = slice(start, min(start + _ROWS, len(indices)))
                further = columns(indices[where]) | (added(where) if added else {})
                table = _table(pairs, indices[where], path.parent, drop=set(further))
                for name, values in further.items():
                    table = table.append_column(name, values)
                if writer is None:
                    kept = dict(table.schema.metadata or {})
                    kept[b"modelwright"] = json.dumps(metadata or {}).encode()
                    writer = parquet.ParquetWriter(partial, table.schema.with_metadata(kept))
                writer.write_table(table.cast(writer.schema))
                progress.advance(len(table))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError, ValueError) as error:
            raise UserError(
                f"The pairs do not fit one Parquet file ({str(error).splitlines()[0]}): give sources with columns of "
                f"the same types, or one at a time."
            ) from error
        finally:
            if writer is not None:
                writer.close()
    return len(indices)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Returns what :func:`write_pool` kept in a file: of a cached reference its fingerprint, scale and bias."""
    from pyarrow import parquet

    kept = (parquet.read_schema(path).metadata or {}).get(b"modelwright")
    return json.loads(kept) if kept else {}


def _table(pairs: Pairs, indices: np.ndarray, folder: Path, drop: set[str]) -> pyarrow.Table:
    """Pairs with all columns that their sources share, as Arrow has them."""
    import datasets
    import pyarrow

    names = [name for name in pairs.column_names if name not in drop]
    tables, places = [], []
    schema = None
    for _, part, local, positions in pairs._split(indices):
        view = part.data.select_columns(names)
        schema = schema or datasets.Features({n: view.features[n] for n in names}).arrow_schema
        table = view.with_format("arrow")[local.tolist()]
        if part.fields.image and part.fields.query in names:
            table = _with_paths(table, part.fields.query, part.base, folder)
        tables.append(table.cast(schema))
        places.append(positions)
    whole = pyarrow.concat_tables(tables).combine_chunks()
    return whole.take(np.argsort(np.concatenate(places)))


def _with_paths(table: pyarrow.Table, name: str, base: Path | None, folder: Path) -> pyarrow.Table:
    """Relative paths of images, rewritten to be relative to the folder of the new file."""
    import pyarrow

    column = table.column(name).combine_chunks()
    kind = column.type
    if isinstance(kind, pyarrow.ExtensionType):
        return table
    old = base or Path()

    def moved(path: str | None) -> str | None:
        if not path or Path(path).expanduser().is_absolute() or path.startswith(("http://", "https://")):
            return path
        return os.path.relpath((old / path).resolve(), folder.resolve())

    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = pyarrow.array([moved(path) for path in column.to_pylist()], type=kind)
    elif pyarrow.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}:
        inside = column.field("bytes").is_null().to_pylist()
        if not any(inside):
            return table  # the path is a name only
        paths = [moved(p) if away else p for p, away in zip(column.field("path").to_pylist(), inside)]
        fields = {"bytes": column.field("bytes"), "path": pyarrow.array(paths, type=kind.field("path").type)}
        column = pyarrow.StructArray.from_arrays([fields[kind.field(i).name] for i in range(2)], fields=list(kind))
    else:
        return table
    return table.set_column(table.column_names.index(name), name, column)


def super_batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the rows of each super-batch: a permutation of all rows, cut; the last may have fewer."""
    order = np.random.default_rng(seed).permutation(count)
    for start in range(0, count, size):
        yield order[start : start + size]
