"""JEST as a trainer of its own: `ContrastiveTrainer` with the selection's options among its arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modelwright.curation.jest.reference import as_encoder
from modelwright.curation.jest.selection import REFERENCE_COLUMNS, JestSelection
from modelwright.errors import UserError
from modelwright.training.contrastive.arguments import ContrastiveTrainingArguments
from modelwright.training.contrastive.trainer import ContrastiveTrainer


@dataclass
class JestArguments(ContrastiveTrainingArguments):
    """Arguments of :class:`JestTrainer`; see :class:`~modelwright.curation.jest.selection.JestSelection`.

    Attributes:
        super_batch_size: Pairs read for each batch, over all processes; None takes ``filter_ratio``.
        filter_ratio: Share of each super-batch that is left out.
        n_chunks: Rounds of the joint draw.
        criterion: ``learnability``, ``hard``, ``easy_reference`` or ``uniform``.
        form: Loss that pairs are scored by: ``sigmoid``, ``softmax`` (experimental), or ``auto``, the learner's.
        normalize: Divide each logit of the draw by its number of terms.
        temperature: What divides the logits of the draw.
        scoring_patch_size: Patch size for scoring; None is the model's.
        multi_resolution: Train a random half of each batch at that patch size too.
    """

    super_batch_size: int | None = field(default=None, metadata={"help": "Pairs read for each batch."})
    filter_ratio: float = field(default=0.8, metadata={"help": "Share of each super-batch that is left out."})
    n_chunks: int = field(default=16, metadata={"help": "Rounds of the joint draw; 1 chooses independently."})
    criterion: str = field(default="learnability", metadata={"help": "Or hard, easy_reference, uniform."})
    form: str = field(default="auto", metadata={"help": "Loss that pairs are scored by: auto, sigmoid or softmax."})
    normalize: bool = field(default=False, metadata={"help": "Divide each logit by its number of terms."})
    temperature: float = field(default=1.0, metadata={"help": "What divides the logits of the draw."})
    scoring_patch_size: int | None = field(default=None, metadata={"help": "Patch size for scoring."})
    multi_resolution: bool = field(default=False, metadata={"help": "Train half of each batch in those patches."})

    def selection(self) -> JestSelection:
        """Returns the selection that these arguments describe.

        Raises:
            UserError: An option out of range, or a super-batch smaller than the batch.
        """
        batch, ratio = self.per_device_train_batch_size * self.world_size, self.filter_ratio
        if self.super_batch_size is not None:
            if self.super_batch_size < batch:
                raise UserError(
                    f"super_batch_size is {self.super_batch_size}, less than the batch of {batch} pairs that is chosen "
                    f"from it: raise it, or lower per_device_train_batch_size."
                )
            ratio = 1 - batch / self.super_batch_size
        return JestSelection(
            filter_ratio=ratio,
            n_chunks=self.n_chunks,
            criterion=self.criterion,  # type: ignore[arg-type]  # checked there
            form=self.form,  # type: ignore[arg-type]
            normalize=self.normalize,
            temperature=self.temperature,
            scoring_patch_size=self.scoring_patch_size,
            multi_resolution=self.multi_resolution,
            seed=self.seed,
        )


class JestTrainer(ContrastiveTrainer):
    """Trains on the jointly most learnable part of each super-batch (paper, Section 3).

    Args:
        model: As for :class:`~modelwright.training.contrastive.trainer.ContrastiveTrainer`.
        args: With the selection's options.
        reference_model: The reference: an encoder of pairs, a model that takes the learner's inputs, or a folder or hub
            id. Not needed where the data hold its cached embeddings
            (:func:`~modelwright.curation.jest.reference.cache_reference_embeddings`).
        keys: As for ``ContrastiveTrainer``: ``train_dataset``, ``eval_dataset``, ``processing_class`` …

    Raises:
        UserError: The criterion needs a reference and there is none, or it does not take the learner's inputs.
    """

    def __init__(
        self, model: Any = None, args: JestArguments | None = None, *, reference_model: Any = None, **keys: Any
    ) -> None:
        args = args or JestArguments(output_dir="trainer_output")
        if not isinstance(args, JestArguments):
            raise UserError("Give JestArguments as args: they say how batches are chosen.")
        if "selection" in keys:
            raise UserError("JestTrainer chooses by JEST: give another selection to ContrastiveTrainer.")
        selection = args.selection()
        super().__init__(model, args, selection=selection, **keys)
        if reference_model is not None:
            selection.attach(self.encoder, as_encoder(reference_model, self.encoder.processor, "cpu"))
        there = getattr(self.train_dataset, "column_names", [])
        if selection.needs_reference and reference_model is None and not set(REFERENCE_COLUMNS) <= set(there):
            raise UserError(
                f"The criterion '{args.criterion}' needs a reference: give reference_model, or data with its cached "
                f"embeddings (cache_reference_embeddings)."
            )
