"""JEST as a choice of batches: for `modelwright train contrastive --select jest` and for `ContrastiveTrainer`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modelwright.curation.jest.flexi import check_patch_size, mixed_patch_sizes, patch_size, relative_cost
from modelwright.curation.jest.sampler import Criterion, Form, JointSampler
from modelwright.curation.jest.scores import batch_loss
from modelwright.errors import UserError
from modelwright.options import Arg
from modelwright.training.contrastive.encoded import Encoded
from modelwright.training.contrastive.selection import Chosen

#: Columns that :func:`~modelwright.curation.jest.reference.cache_reference_embeddings` writes.
REFERENCE_COLUMNS = ("ref_query_embeds", "ref_key_embeds", "ref_scale", "ref_bias")
#: Rows at most that the log's losses are measured on.
_LOGGED_ROWS = 2048


@dataclass(kw_only=True)
class JestSelection:
    """Trains on the jointly most learnable part of each super-batch: hard for the learner, easy for a reference.

    The reference is a model trained on a small clean set. It is frozen; its embeddings of the data are best computed
    once (`modelwright select jest --cache-only`), or it is named here and embeds every super-batch anew.
    """

    reference: Annotated[
        str | None,
        Arg("Reference model: a folder or hub id; left out where the data hold its cached embeddings.", kind="input"),
    ] = None
    filter_ratio: Annotated[float, Arg("Share of each super-batch that is left out.")] = 0.8
    n_chunks: Annotated[int, Arg("Rounds of the joint draw; 1 chooses pairs independently.")] = 16
    criterion: Annotated[
        Criterion,
        Arg("learnability: learner's loss minus the reference's; hard: the learner's; easy_reference; uniform."),
    ] = "learnability"
    form: Annotated[
        Literal["auto", "sigmoid", "softmax"],
        Arg("Loss that pairs are scored by; auto: the learner's (the softmax form is experimental)."),
    ] = "auto"
    normalize: Annotated[bool, Arg("Divide each logit of the draw by its number of terms: less greedy.")] = False
    temperature: Annotated[float, Arg("What divides the logits of the draw; 0 takes the best.")] = 1.0
    scoring_patch_size: Annotated[
        int | None, Arg("Score pictures in patches of this size, such as twice the model's: cheaper (Flexi-JEST).")
    ] = None
    multi_resolution: Annotated[
        bool, Arg("Train a random half of each batch in those patches too, so that their scores keep their meaning.")
    ] = False
    block_size: Annotated[int, Arg("Side of the tiles of pairs that are scored at once.", kind="run")] = 2048
    seed: Annotated[int, Arg("Seed of the draw.")] = 0

    #: Columns of the data that :meth:`choose` looks for among its extras.
    columns: ClassVar[tuple[str, ...]] = (*REFERENCE_COLUMNS, "clean")
    #: Of these the ones that only the log needs: a column of that name may as well be a text.
    logged_columns: ClassVar[tuple[str, ...]] = ("clean",)

    def __post_init__(self) -> None:
        self._sampler()  # faulty options are refused before any work
        if self.multi_resolution and self.scoring_patch_size is None:
            raise UserError("multi_resolution needs a scoring_patch_size: say the larger patch size.")
        if self.seed < 0:
            raise UserError(f"seed must be 0 or more, not {self.seed}.")
        self._learner: Any = None
        self._reference: Any = None
        self._reference_cost = 1.0  # of its forward pass over the learner's

    def _sampler(self, form: Form = "sigmoid") -> JointSampler:
        return JointSampler(
            n_chunks=self.n_chunks,
            filter_ratio=self.filter_ratio,
            criterion=self.criterion,
            form=form if self.form == "auto" else self.form,
            normalize=self.normalize,
            temperature=self.temperature,
            block_size=self.block_size,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the criterion looks at a reference."""
        return self._sampler().needs_reference

    def super_batch_size(self, batch_size: int) -> int:
        """Returns how many pairs are read for a batch: ``batch_size / (1 - filter_ratio)``, rounded."""
        return JointSampler(filter_ratio=self.filter_ratio).super_batch_size(batch_size)

    def attach(self, learner: Any, reference: Any = None) -> None:
        """Says which encoders are at work; the trainer calls it before the first step.

        Args:
            learner: The :class:`~modelwright.training.contrastive.encoders.PairEncoder` that is trained.
            reference: One in memory, instead of :attr:`reference`.

        Raises:
            UserError: The patch size does not fit the learner, the reference does not take the learner's inputs, or it
                is the learner itself.
        """
        self._learner = learner
        if self.scoring_patch_size is not None:
            check_patch_size(learner.model, self.scoring_patch_size)
            if self.multi_resolution:
                mixed_patch_sizes(learner.model, self.scoring_patch_size)
        if reference is None and self.reference is not None and self._sampler().needs_reference:
            from modelwright.training.contrastive.encoders import load_pair_encoder

            reference = load_pair_encoder(self.reference, device="cpu")
        if reference is not None:
            _check_inputs(learner.collator, reference.collator)
            trained = {id(parameter) for parameter in learner.parameters()}
            if any(id(parameter) in trained for parameter in reference.parameters()):
                raise UserError(
                    "The reference shares its weights with the learner, so freezing it would freeze the learner: give "
                    "a model of its own (copy.deepcopy)."
                )
            self._reference = reference.requires_grad_(False).eval()
            self._reference_cost = 0.0  # found out with the first super-batch

    def choose(
        self,
        encode: Callable[[list[dict[str, Any]]], Encoded],
        super_batch: list[dict[str, Any]],
        size: int,
        step: int,
        extras: Mapping[str, Tensor],
    ) -> Chosen:
        """Chooses ``size`` pairs; see :class:`~modelwright.training.contrastive.selection.Selection`.

        The draw depends on the seed, the step and the embeddings alone. Columns among the extras: the cached reference
        (:data:`REFERENCE_COLUMNS`), and ``clean`` (0 or 1), if there is one, for the log.

        Raises:
            UserError: There is no reference where the criterion needs one, or embeddings cannot be scored.
        """
        started = time.perf_counter()
        sampler, count = self._sampler(), _rows(super_batch) * _processes()
        learner = reference = None
        with torch.no_grad():
            if sampler.needs_learner:
                learner = self._scored(encode, super_batch)
            if sampler.needs_reference:
                reference = self._embed_reference(super_batch, extras, learner)
        models = [encoded for encoded in (learner, reference) if encoded is not None]
        if models:
            if self.form == "auto":
                sampler = self._sampler("softmax" if models[0].bias is None else "sigmoid")
            indices = sampler.select(learner, reference, size, self._generator(step))
        else:
            indices = torch.randperm(count, generator=self._generator(step))[:size]
        indices = _same_everywhere(indices)
        with torch.no_grad():
            logs = self._losses(sampler.form, learner, reference, indices, count, step)
        logs |= self._costs(sampler, super_batch, count / size)
        if "clean" in extras:
            clean = extras["clean"].float().flatten()
            logs |= {"clean_chosen": float(clean[indices.to(clean.device)].mean()), "clean": float(clean.mean())}
        logs["seconds"] = time.perf_counter() - started
        return Chosen(indices, {f"jest_{name}": value for name, value in logs.items()})

    def _generator(self, step: int, purpose: int = 0) -> torch.Generator:
        state = int(np.random.SeedSequence((self.seed, step, purpose)).generate_state(1, np.uint64)[0])
        return torch.Generator().manual_seed(state >> 1)

    def _scored(self, encode: Callable[[list[dict[str, Any]]], Encoded], super_batch: list[dict[str, Any]]) -> Encoded:
        if self.scoring_patch_size is None:
            return encode(super_batch)
        if self._learner is None:
            raise UserError("scoring_patch_size needs the learner's model: call attach(learner) before training.")
        with patch_size(self._learner.model, self.scoring_patch_size):
            return encode(super_batch)

    def _embed_reference(
        self, super_batch: list[dict[str, Any]], extras: Mapping[str, Tensor], learner: Encoded | None
    ) -> Encoded:
        device = learner.queries.device if learner is not None else None
        if self._reference is None:
            if self.reference is not None:
                raise UserError("The reference model is not loaded: call attach(learner) before training.")
            return cached_reference(extras, device)
        # At its own patch size: it need not have been trained at two, and its embeddings can be cached instead.
        encoder = self._reference.to(device or self._learner.device)
        if not self._reference_cost:
            self._reference_cost = _flops(encoder, super_batch[0]) / _flops(self._learner, super_batch[0])
        parts = [_embed(encoder, part) for part in super_batch]
        queries, keys = torch.cat([p.queries for p in parts]), torch.cat([p.keys for p in parts])
        return Encoded(_gathered(queries), _gathered(keys), None, parts[0].scale, parts[0].bias)

    def _losses(
        self, form: Form, learner: Encoded | None, reference: Encoded | None, chosen: Tensor, count: int, step: int
    ) -> dict[str, float]:
        """Losses of the chosen batch, and of as many pairs of the super-batch at random; on at most 2,048 pairs."""
        generator = self._generator(step, 1)
        size = len(chosen)
        some = torch.randperm(size, generator=generator)[:_LOGGED_ROWS].to(chosen.device)
        others = torch.randperm(count, generator=generator)[: min(size, _LOGGED_ROWS)].to(chosen.device)
        logs: dict[str, float] = {}
        for name, encoded in (("learner_loss", learner), ("reference_loss", reference)):
            if encoded is not None:
                logs[name] = batch_loss(encoded, others.to(encoded.queries.device), size, form)
                logs[f"{name}_chosen"] = batch_loss(encoded, chosen[some].to(encoded.queries.device), size, form)
        if learner is not None and reference is not None:
            for end in ("", "_chosen"):
                logs[f"learnability{end}"] = logs[f"learner_loss{end}"] - logs[f"reference_loss{end}"]
        return logs

    def _costs(self, sampler: JointSampler, super_batch: list[dict[str, Any]], ratio: float) -> dict[str, float]:
        coarse = 1.0
        if self.scoring_patch_size is not None and self._learner is not None:
            tokens = super_batch[0]["input_ids"].shape[1] if "input_ids" in super_batch[0] else 0
            coarse = relative_cost(self._learner.model, self.scoring_patch_size, tokens)
        scoring = coarse if sampler.needs_learner else 0.0
        training = (1 + coarse) / 2 if self.multi_resolution else 1.0
        model = self._reference_cost if self._reference is not None and sampler.needs_reference else 0.0
        return {
            "flop_ratio": flop_ratio(ratio, scoring=scoring, training=training, reference=model),
            "flop_ratio_paper": flop_ratio(ratio, scoring=scoring, training=training, reused=True),
        }


def flop_ratio(
    ratio: float, *, scoring: float = 1.0, training: float = 1.0, reference: float = 0.0, reused: bool = False
) -> float:
    """FLOPs of a step over those of a step without selection: training counts as three forward passes.

    Args:
        ratio: B / b.
        scoring: Cost of the learner's scoring pass over its forward pass in training; 0 if it is not needed.
        training: The same of training, below 1 with :attr:`JestSelection.multi_resolution`.
        reference: The same of the reference's pass; 0 if its embeddings are cached.
        reused: Whether the chosen pairs' scoring pass counts for nothing, as in the paper, which so gets 7/3 at
            B = 5b. Here each chosen pair is encoded twice, which makes 8/3.
    """
    return (3 * training + (ratio - reused) * scoring + ratio * reference) / 3


def cached_reference(columns: Mapping[str, Tensor], device: torch.device | None = None) -> Encoded:
    """Makes embeddings out of :data:`REFERENCE_COLUMNS`.

    Args:
        columns: (B, d), (B, d), (B,) and (B,); a bias of NaN is none.
        device: Where they go; None leaves them.

    Raises:
        UserError: A column is missing, or the rows come from several references.
    """
    missing = [name for name in REFERENCE_COLUMNS if name not in columns]
    if missing:
        raise UserError(
            f"A reference is needed and the data have no column {missing[0]}: name a reference model (reference), or "
            f"cache its embeddings with the data first (`modelwright select jest --cache-only`)."
        )
    queries, keys, scales, biases = (columns[name].to(device) for name in REFERENCE_COLUMNS)
    for name, values in (("ref_scale", scales), ("ref_bias", biases)):
        if bool((values != values[0]).logical_and(~(values.isnan() & values[0].isnan())).any()):
            raise UserError(
                f"The column {name} has different values: the rows were embedded by different reference models; embed "
                f"them again with one."
            )
    bias = biases.flatten()[0]
    return Encoded(queries, keys, None, scales.flatten()[0], None if bool(bias.isnan()) else bias)


def _check_inputs(learner: Any, reference: Any) -> None:
    """Refuses a reference that would misread the learner's inputs."""
    differing = []
    if (learner.image_processor is None) != (reference.image_processor is None):
        differing.append("kind of queries")
    elif (
        learner.image_processor is not None and learner.image_processor.to_dict() != reference.image_processor.to_dict()
    ):
        differing.append("image processor")
    if learner.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        differing.append("tokenizer")
    lengths_fit = learner.max_tokens <= reference.max_tokens
    if reference.pad_to_max or learner.pad_to_max:
        lengths_fit = learner.pad_to_max == reference.pad_to_max and learner.max_tokens == reference.max_tokens
    if not lengths_fit:
        differing.append("length of texts")
    if (learner.prompt, learner.lower) != (reference.prompt, reference.lower):
        differing.append("prompt or case of texts")
    if differing:
        raise UserError(
            f"The reference cannot read what is prepared for the learner (another {', another '.join(differing)}): "
            f"cache its embeddings with the data first (`modelwright select jest --cache-only`)."
        )


def _embed(encoder: Any, part: Mapping[str, Tensor]) -> Encoded:
    encoded: Encoded = encoder({name: values.to(encoder.device) for name, values in part.items()})
    return encoded


def _flops(encoder: Any, part: Mapping[str, Tensor]) -> float:
    """Floating-point operations of embedding a sub-batch: products of matrices, convolutions and attention."""
    counter = FlopCounterMode(display=False)
    with counter:
        _embed(encoder, part)
    return float(counter.get_total_flops())


def _rows(super_batch: list[dict[str, Any]]) -> int:
    names = ("pixel_values", "query_input_ids", "input_ids")
    return sum(next((len(part[n]) for n in names if n in part), len(next(iter(part.values())))) for part in super_batch)


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of the ranks; every process has as many."""
    if _processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_processes())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _same_everywhere(indices: Tensor) -> Tensor:
    """The first process's choice: where devices differ, so may rounding, and one row would be enough to part ways."""
    if _processes() == 1:
        return indices
    shared = indices.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")  # nccl knows no other place
    torch.distributed.broadcast(shared, 0)
    return shared.to(indices.device)
