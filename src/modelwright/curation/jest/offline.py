"""JEST without training: a whole pool cut into super-batches, of each of which the learnable part is kept, in order."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn.functional import softplus

from modelwright.curation.jest.pool import PoolEmbeddings, embed_pool, embeddings_folder, super_batches, write_pool
from modelwright.curation.jest.reference import as_encoder, cached_embeddings, check_kind, check_parquet, describe
from modelwright.curation.jest.sampler import JointSampler
from modelwright.curation.jest.scores import batch_loss
from modelwright.errors import UserError
from modelwright.progress import Progress, Silent
from modelwright.training.contrastive.encoded import Encoded

if TYPE_CHECKING:
    from modelwright.training.contrastive.pairs import Pairs

#: Pairs at most that a batch's losses in the report are measured on.
_REPORTED_ROWS = 2048


@dataclass
class OfflineChoice:
    """What was chosen from a pool.

    Attributes:
        rows: (n,) int64, positions in the pool, in the order of choice.
        batches: (n,) int64, which super-batch each is from.
        chunks: (n,) int64, in which round of its draw.
        scores: (n,) float64, its score given the rows of earlier rounds.
        losses: ``learner`` and ``reference``, as far as they were needed: each pair's own loss by that model.
        learnability: Mean over the batches of the chosen batch's learnability, and of as many pairs of the super-batch
            at random; None without both models.
    """

    rows: np.ndarray
    batches: np.ndarray
    chunks: np.ndarray
    scores: np.ndarray
    losses: dict[str, np.ndarray]
    learnability: dict[str, float] | None


def choose_offline(
    learner: PoolEmbeddings | None,
    reference: PoolEmbeddings | None,
    count: int,
    sampler: JointSampler,
    *,
    super_batch: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> OfflineChoice:
    """Chooses from every super-batch of a shuffled pool; the last may be smaller, and gives its share.

    Args:
        learner: Its embeddings; None if the criterion ignores it.
        reference: The reference's; None if the criterion ignores it.
        count: Pairs of the pool.
        sampler: How to choose.
        super_batch: Pairs of a super-batch.
        seed: Of the cut and of the draws.
        device: Where to score.
        progress: Told of each pair.

    Raises:
        UserError: Embeddings that cannot be scored.
    """
    progress = progress or Silent()
    progress.start("choose", count)
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    losses: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    learnability: list[tuple[float, float]] = []
    for number, rows in enumerate(super_batches(count, super_batch, seed)):
        state = int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(state >> 1)
        models = {
            name: embeddings.rows(rows, device) if embeddings is not None else None
            for name, embeddings in (("learner", learner), ("reference", reference))
        }
        if all(encoded is None for encoded in models.values()):
            chosen = torch.randperm(len(rows), generator=generator)[: sampler.batch_size(len(rows))]
            chunks, scores = torch.zeros_like(chosen), torch.zeros(len(chosen))
        else:
            chosen, chunks, scores = sampler.draw(models["learner"], models["reference"], generator=generator)
        picked = chosen.cpu().numpy()
        found["rows"].append(rows[picked])
        found["batches"].append(np.full(len(picked), number))
        found["chunks"].append(chunks.cpu().numpy())
        found["scores"].append(scores.double().cpu().numpy())
        for name, encoded in models.items():
            if encoded is not None:
                losses[name].append(_own_losses(encoded, sampler.form).cpu().numpy()[picked])
        if models["learner"] is not None and models["reference"] is not None:
            size = len(chosen)
            some = torch.randperm(size, generator=generator)[:_REPORTED_ROWS]
            others = torch.randperm(len(rows), generator=generator)[: len(some)]
            means = [
                batch_loss(models["learner"], part.to(device), size, sampler.form)
                - batch_loss(models["reference"], part.to(device), size, sampler.form)
                for part in (chosen.cpu()[some], others)
            ]
            learnability.append((means[0], means[1]))
        progress.advance(len(rows))
    means = np.mean(learnability, axis=0).tolist() if learnability else []
    return OfflineChoice(
        **{name: np.concatenate(values) for name, values in found.items()},
        losses={name: np.concatenate(values) for name, values in losses.items()},
        learnability={"chosen": means[0], "random": means[1]} if means else None,
    )


def _own_losses(encoded: Encoded, form: str) -> torch.Tensor:
    """Each pair's own loss, as the first round scores it."""
    logits = encoded.scale * (encoded.queries * encoded.keys).sum(1)
    if form == "softmax":
        return -logits
    assert encoded.bias is not None
    return softplus(-(logits + encoded.bias))


def select_offline(
    pairs: Pairs,
    output: str | Path,
    sampler: JointSampler | None = None,
    *,
    learner: Any = None,
    reference: Any = None,
    super_batch: int = 1024,
    form: Literal["auto"] | None = "auto",
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    group_field: str | None = None,
    target_groups: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Chooses from a pool by JEST and writes the chosen pairs, in order, to a Parquet file.

    Columns are added: ``jest_order`` (from 0), ``jest_batch``, ``jest_chunk``, ``jest_score``, and as far as they were
    needed ``jest_learner_loss`` and ``jest_reference_loss``. Embeddings are kept in ``<output>.embedding`` until the
    output stands, so that the same call after a crash goes on. The learner stays as it is: each super-batch is scored
    by the same model, unlike in training.

    Args:
        pairs: The pool; a reference's cached embeddings among its columns are used.
        output: Parquet file.
        sampler: How to choose.
        learner: The learner: an encoder of pairs, or a folder or hub id.
        reference: The reference, likewise; not needed where it is cached.
        super_batch: Pairs of a super-batch.
        form: ``auto`` scores by the learner's loss (where it is not needed, by the reference's); None by the sampler's.
        seed: Of the cut and of the draws.
        batch_size: Pairs in a model at a time.
        workers: Processes that read and prepare pairs.
        device: Where models run and scores are made; None takes the accelerator if there is one.
        group_field: Column that names a pair's kind: reports what was chosen by kind.
        target_groups: Kinds that are wanted: reports precision and recall.
        force: Whether to replace the output.
        progress: Shows what is being done.

    Returns:
        Counts, shares of clean pairs (where a column ``clean`` says which they are) and of kinds, mean losses,
        learnability.

    Raises:
        UserError: The output exists, a model is missing or does not fit, or a pair cannot be read.
    """
    sampler = sampler or JointSampler()
    output = check_parquet(output, force)
    if super_batch < 1:
        raise UserError(f"The super-batch must have at least 1 pair, not {super_batch}.")
    if target_groups and not group_field:
        raise UserError("target_groups needs group_field: say which column names a pair's kind.")
    labels = _labels(pairs, group_field, target_groups)
    if sampler.needs_learner and learner is None:
        raise UserError(f"The criterion '{sampler.criterion}' needs the learner: give a model (--model).")
    cached = cached_embeddings(pairs) if sampler.needs_reference and reference is None else None
    if sampler.needs_reference and reference is None and cached is None:
        raise UserError(
            f"The criterion '{sampler.criterion}' needs a reference: give one (--reference), or pairs with its cached "
            f"embeddings (--cache-only)."
        )
    models: dict[str, PoolEmbeddings | None] = {"learner": None, "reference": cached}
    wanted = {
        "learner": learner if sampler.needs_learner else None,
        "reference": reference if sampler.needs_reference else None,
    }
    where: torch.device | str = "cpu" if device in (None, "auto") else str(device)
    encoders = {name: as_encoder(model, device=device) for name, model in wanted.items() if model is not None}
    for name, encoder in encoders.items():
        check_kind(encoder, pairs, name)
        where = encoder.device
    # Before anything is embedded, which may take hours.
    without = [name for name, encoder in encoders.items() if encoder.bias() is None]
    if cached is not None and cached.bias is None:
        without.append("reference")
    first = next(iter(encoders), "reference")
    if form == "auto" and (encoders or cached is not None):
        sampler = dataclasses.replace(sampler, form="softmax" if first in without else "sigmoid")
    if sampler.form == "sigmoid" and without:
        raise UserError(
            f"The {without[0]} has no bias, as if trained with the softmax loss: choose the form 'softmax' (--form)."
        )
    with embeddings_folder(output) as folder:
        for name, encoder in encoders.items():
            models[name] = embed_pool(
                encoder, pairs, folder=folder, label=name, batch_size=batch_size, workers=workers, progress=progress
            )
        choice = choose_offline(
            models["learner"],
            models["reference"],
            len(pairs),
            sampler,
            super_batch=super_batch,
            seed=seed,
            device=where,
            progress=progress,
        )
        described = {name: describe(model) for name, model in models.items() if model is not None}
        write_pool(
            pairs,
            output,
            lambda rows: {},
            indices=choice.rows,
            added=lambda part: _columns(choice, part),
            metadata={"criterion": sampler.criterion, "seed": seed, **described},
            force=force,
            progress=progress,
        )
    return {"output": str(output), "form": sampler.form, **_summary(choice, len(pairs), labels, target_groups)}


def _columns(choice: OfflineChoice, part: slice) -> dict[str, Any]:
    import pyarrow

    columns = {
        "jest_order": np.arange(part.start, part.stop),
        "jest_batch": choice.batches[part],
        "jest_chunk": choice.chunks[part],
        "jest_score": choice.scores[part],
        **{f"jest_{name}_loss": values[part] for name, values in choice.losses.items()},
    }
    return {name: pyarrow.array(values) for name, values in columns.items()}


def _labels(pairs: Pairs, group_field: str | None, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """What is known of the pairs: ``clean``, and their kinds."""
    found: dict[str, np.ndarray] = {}
    if group_field is not None:
        if group_field not in pairs.column_names:
            raise UserError(f"The pairs have no column '{group_field}' (columns: {', '.join(pairs.column_names)}).")
        found["group"] = _text_column(pairs, group_field)
        if missing := set(wanted) - set(found["group"]):
            raise UserError(f"No pair is of the kind '{sorted(missing)[0]}' in the column '{group_field}'.")
    if "clean" in pairs.column_names:
        values = _text_column(pairs, "clean")
        if set(values) <= {"True", "False", "0", "1", "0.0", "1.0"}:
            found["clean"] = np.isin(values, ["True", "1", "1.0"])
    return found


def _text_column(pairs: Pairs, name: str) -> np.ndarray:
    values: list[str] = []
    for start in range(0, len(pairs), 4096):
        batch = np.arange(start, min(start + 4096, len(pairs)))
        part_values = [""] * len(batch)
        for _, part, local, positions in pairs._split(batch):
            for position, value in zip(positions, part.data.select_columns([name])[local.tolist()][name]):
                part_values[position] = str(value)
        values += part_values
    return np.array(values)


def _summary(choice: OfflineChoice, count: int, labels: dict[str, np.ndarray], wanted: Sequence[str]) -> dict[str, Any]:
    rows = choice.rows
    summary: dict[str, Any] = {
        "pool_pairs": count,
        "pairs": len(rows),
        "super_batches": int(choice.batches[-1]) + 1,
        "losses": {f"{name}_chosen": float(values.mean()) for name, values in choice.losses.items()},
        "learnability": choice.learnability,
    }
    if "clean" in labels:
        clean = labels["clean"]
        summary["clean"] = {"chosen": float(clean[rows].mean()), "pool": float(clean.mean())}
    if "group" in labels:
        group = labels["group"]
        pool, chosen = collections.Counter(group.tolist()), collections.Counter(group[rows].tolist())
        summary["groups"] = {name: {"pool": pool[name], "chosen": chosen[name]} for name in sorted(pool)}
        if wanted:
            right = np.isin(group, list(wanted))
            summary["precision"] = float(right[rows].mean())
            summary["recall"] = float(right[rows].sum() / right.sum())
    return summary
