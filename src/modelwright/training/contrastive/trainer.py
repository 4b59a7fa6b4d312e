"""``transformers.Trainer`` for encoders of pairs: GradCache, tiled losses, chosen batches, retrieval on the way."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from modelwright.errors import UserError
from modelwright.evaluation.retrieval import paired_metrics
from modelwright.files import read_json
from modelwright.training.contrastive.arguments import ContrastiveTrainingArguments
from modelwright.training.contrastive.batches import Batch, Batches, Order, prepared, read, take
from modelwright.training.contrastive.encoded import Encoded
from modelwright.training.contrastive.encoders import STATE_FILE, PairEncoder, pair_encoder
from modelwright.training.contrastive.grad_cache import cached
from modelwright.training.contrastive.pairs import Pairs, pairs_of
from modelwright.training.contrastive.selection import Selection
from modelwright.training.heartbeat import Heartbeat, connection_lost
from modelwright.training.inf_cl.loss import InfoNCELoss, SigmoidLoss
from modelwright.training.resume import ResumableTrainer


class ContrastiveTrainer(ResumableTrainer):
    """Trains a dual encoder of images and texts, or an encoder of texts, at any batch size.

    In memory are the activations of ``args.mini_batch_size`` pairs (GradCache), the embeddings of the whole batch, and
    tiles of the loss: nothing grows with the square of the batch. With several processes (``torchrun``,
    ``accelerate launch``) the loss is over the pairs of all of them, and the result is that of one process with the
    same pairs.

    Checkpoints are model folders (``from_pretrained``, or ``SentenceTransformer`` for encoders of texts) with the state
    of training beside; ``train(resume_from_checkpoint=...)`` goes on as if it had not been stopped.

    Args:
        model: A ``PairEncoder``, or a model that is wrapped in one: ``CLIPModel``, ``SiglipModel``, any encoder of
            texts.
        args: See :class:`ContrastiveTrainingArguments`.
        train_dataset: The pairs: ``Pairs``, or a ``datasets.Dataset`` with a column of images or texts and another of
            texts.
        eval_dataset: Held-out pairs; evaluation reports retrieval among them, both ways.
        processing_class: The model's image-text processor or tokenizer; not needed with a ``PairEncoder``.
        loss: A loss such as ``InfCLLoss()``, called with queries, keys and scale, and with ``logit_bias=`` too if the
            encoder's objective is sigmoid. It is over this process's pairs only, unless it was given a process group.
            None takes the one that suits the objective, over the pairs of all processes.
        selection: Chooses each batch from a larger one. Random transforms of the data must depend on the row: with
            several processes a chosen row may be read again by another one.
        keys: As for ``Trainer`` (``callbacks``, ``optimizers`` …) and ``ResumableTrainer``.

    Raises:
        UserError: The data do not fill a batch, processes cannot share it evenly, or model and data do not fit.
    """

    args: ContrastiveTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: ContrastiveTrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        loss: nn.Module | None = None,
        selection: Selection | None = None,
        **keys: Any,
    ) -> None:
        args = args or ContrastiveTrainingArguments(output_dir="trainer_output")
        if not isinstance(args, ContrastiveTrainingArguments):
            raise UserError(
                "args must be ContrastiveTrainingArguments: plain TrainingArguments have no mini_batch_size."
            )
        if not isinstance(model, PairEncoder):
            if processing_class is None:
                raise UserError("Give the model's processor or tokenizer as processing_class.")
            model = pair_encoder(model, processing_class)
        train_dataset, eval_dataset = _as_pairs(train_dataset), _as_pairs(eval_dataset)
        for data in (train_dataset, eval_dataset):
            _check_kind(model, data)
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs without torchrun would mean DataParallel, which splits a batch
        args.ignore_data_skip = True  # the loader begins at any step by itself
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.processor,
            data_collator=model.collator,
            **keys,
        )
        self.model_accepts_loss_kwargs = False
        self.encoder: PairEncoder = model
        self.batch_size = args.per_device_train_batch_size * args.world_size
        self.loss = loss if loss is not None else default_loss(model, args.world_size)
        self.selection = selection
        if selection is not None and hasattr(selection, "attach"):
            selection.attach(model)
        self.add_callback(_ClampScale(model))
        self._columns: dict[str, np.ndarray | None] = {}
        self._shown: dict[str, Tensor] = {}
        self._row: tuple[float, float] = (0.0, 0.0)

    def get_train_dataloader(self) -> Any:
        """Returns the :class:`~modelwright.training.contrastive.batches.Batches` of the run."""
        if self.train_dataset is None:
            raise UserError("There is nothing to train on: give train_dataset.")
        size = self.selection.super_batch_size(self.batch_size) if self.selection else self.batch_size
        return Batches(
            self.train_dataset,
            self.encoder.collator,
            Order(len(self.train_dataset), size, self.args.seed, self.args.process_index, self.args.world_size),
            mini_batch_size=self.args.mini_batch_size,
            workers=self.args.dataloader_num_workers,
            pin=self.args.device.type == "cuda" and self.args.dataloader_pin_memory,
        )

    def train(self, *args: Any, **keys: Any) -> Any:
        """As ``Trainer.train``; with several processes, each ends within a minute after another has died.

        Raises:
            UserError: The loss is not finite, the data are at fault, or another process has ended.
        """
        with Heartbeat():
            try:
                found = super().train(*args, **keys)
                self.accelerator.wait_for_everyone()
            except RuntimeError as error:
                if self.args.world_size == 1 or not connection_lost(error):
                    raise
                raise UserError(
                    f"Another process of this run has ended (this is process {self.args.process_index} of "
                    f"{self.args.world_size}): see its message; the same command goes on from the last checkpoint."
                ) from error
        return found

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared_ = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        train_dataloader.begin(self.state.global_step, max_steps)
        self._row = (self.state.global_step * self.batch_size, self.clock.total)
        return prepared_

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Encodes a :class:`~modelwright.training.contrastive.batches.Batch` with GradCache; returns its loss, ()."""
        parts = self._chosen(inputs) if self.selection is not None else inputs
        encoded = cached(model, parts, device=self.args.device, module=self.encoder, remember=self.encoder.remembering)
        self._shown = {"scale": encoded.scale.detach()}
        if encoded.bias is not None:
            self._shown["bias"] = encoded.bias.detach()
        loss = self.loss_of(encoded)
        self._losses.append(loss.detach())
        return (loss, encoded) if return_outputs else loss

    def loss_of(self, encoded: Encoded) -> Tensor:
        """Returns the loss of a batch's embeddings, ()."""
        queries, keys, negatives, scale, bias = encoded
        if bias is not None:
            if negatives is not None:
                raise UserError("The sigmoid loss has no hard negatives: leave them out, or train with softmax.")
            return self.loss(queries, keys, scale, logit_bias=bias)
        return self.loss(queries, keys if negatives is None else torch.cat([keys, negatives]), scale)

    def _chosen(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The sub-batches of this process's share of what the selection takes from a super-batch."""
        assert self.selection is not None
        parts, sizes, data = list(batch), list(batch.sizes), self.train_dataset
        columns = ((name, self._column(name)) for name in getattr(self.selection, "columns", ()))
        extras = {name: torch.from_numpy(values[batch.everyone]) for name, values in columns if values is not None}
        with undisturbed(self.encoder):
            indices, logs = self.selection.choose(
                self._encode_all, parts, self.batch_size, self.state.global_step, extras
            )
        for name, value in logs.items():
            self._noted.setdefault(name, []).append(float(value))
        positions = indices.cpu().numpy()
        if len(np.unique(positions)) != self.batch_size or not 0 <= positions.min() <= positions.max() < len(
            batch.everyone
        ):
            raise ValueError(f"the selection did not choose {self.batch_size} different rows of the super-batch")
        each = len(batch.rows)
        own, foreign = share_out(positions, each, self.args.process_index, self.args.world_size)
        step = self.args.mini_batch_size
        for i in range(0, len(foreign), step):
            rows = read(data, batch.everyone[foreign[i : i + step]])
            parts.append(self.encoder.collator(rows))
            sizes.append(len(rows))
        places = [*(own - self.args.process_index * each), *range(each, each + len(foreign))]
        padding = {"input_ids": self.encoder.collator.tokenizer.pad_token_id}
        return [take(parts, sizes, places[i : i + step], padding) for i in range(0, len(places), step)]

    def _column(self, name: str) -> np.ndarray | None:
        """A column of the training data, read once; None if there is none, or nothing that the selection can log."""
        if name not in self._columns:
            data, found = self.train_dataset, None
            if name in getattr(data, "column_names", []):
                try:
                    found = data.column(name)
                except UserError:
                    if name not in getattr(self.selection, "logged_columns", ()):
                        raise
            self._columns[name] = found
        return self._columns[name]

    def _encode_all(self, parts: Iterable[Mapping[str, Tensor]]) -> Encoded:
        """Embeds sub-batches of every process, without gradient; rows in the order of the ranks."""
        with torch.no_grad():
            return self._gathered(cached(self.encoder, parts, device=self.args.device))

    def _gathered(self, encoded: Encoded) -> Encoded:
        if self.args.world_size == 1:
            return encoded
        gather = self.accelerator.gather
        return Encoded._make(gather(t.contiguous()) if t is not None and t.ndim else t for t in encoded)

    def embed(self, dataset: Any) -> Encoded:
        """Embeds all pairs of a data set in their order, shared out over the processes, which all get the result."""
        data = _as_pairs(dataset)
        world, rank, step = self.args.world_size, self.args.process_index, self.args.mini_batch_size
        each = -(-len(data) // world)
        # Every process embeds equally many; the last ones take some of the first rows again.
        mine = np.arange(rank * each, (rank + 1) * each) % len(data)
        lists = (mine[i : i + step].tolist() for i in range(0, each, step))
        parts = prepared(data, self.encoder.collator, lists, workers=self.args.dataloader_num_workers)
        with undisturbed(self.encoder):
            queries, keys, negatives, scale, bias = self._encode_all(parts)
        if negatives is not None:
            negatives = negatives[: len(negatives) // len(keys) * len(data)]
        return Encoded(queries[: len(data)], keys[: len(data)], negatives, scale, bias)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Retrieval among the held-out pairs: each process embeds a part, and all get the same numbers.

        Returns:
            ``eval_query_to_key_r1``, ``…_r5``, ``…_r10``, ``…_mrr``, ``…_median_rank``, the same of ``key_to_query``,
            and ``eval_mean_r1`` …: see :func:`~modelwright.evaluation.retrieval.paired_metrics`.

        Raises:
            UserError: There are no held-out pairs, one cannot be read, or embeddings are not finite.
        """
        data = _as_pairs(self.eval_dataset if eval_dataset is None else eval_dataset)
        if data is None or not len(data):
            raise UserError("There are no held-out pairs to evaluate on: give eval_dataset.")
        self.clock.stop()
        encoded = self.embed(data)
        found = paired_metrics(encoded.queries, encoded.keys, _identities(data))
        for name in ("queries", "keys", "pairs"):
            del found[name]  # the same in every row of the log
        metrics = {f"{metric_key_prefix}_{name.replace('recall@', 'r')}": value for name, value in found.items()}
        if self.is_in_train:
            self.clock.start()
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def progress_made(self) -> dict[str, float]:
        """Pairs trained on; those read and not chosen do not count."""
        return {"pairs": self.state.global_step * self.batch_size}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds pairs, pairs a second since the last row, scale and bias."""
        if self.train_dataset is not None:
            size = self.selection.super_batch_size(self.batch_size) if self.selection else self.batch_size
            self.state.epoch = self.state.global_step / (len(self.train_dataset) // size)
        if "loss" in logs:
            logs.update({name: float(value) for name, value in self._shown.items()})
            pairs, seconds = self.state.global_step * self.batch_size, self.clock.read()
            if seconds > self._row[1]:
                logs["pairs_per_second"] = round((pairs - self._row[0]) / (seconds - self._row[1]), 2)
            self._row = (pairs, seconds)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.encoder.save(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.encoder, Path(resume_from_checkpoint))


class _ClampScale(TrainerCallback):
    def __init__(self, encoder: PairEncoder) -> None:
        self.encoder = encoder

    def on_optimizer_step(self, *args: Any, **keys: Any) -> None:
        self.encoder.clamp_scale()


def default_loss(encoder: PairEncoder, processes: int = 1, **options: Any) -> nn.Module:
    """Returns the loss that suits an encoder, over the pairs of all processes.

    Softmax: both directions for image-text (CLIP), from query to key for text-text. Sigmoid: SigLIP's.

    Args:
        encoder: Its objective and kind decide.
        processes: Number of processes.
        options: Of the loss: ``block_size``, ``backend``, ``symmetric``.
    """
    options.setdefault("process_group", dist.group.WORLD if processes > 1 else None)
    if encoder.objective == "sigmoid":
        options.pop("symmetric", None)
        return SigmoidLoss(**options)
    if options.get("symmetric") is None:
        options["symmetric"] = encoder.kind == "image-text"
    return InfoNCELoss(**options)  # with as many keys as queries this is InfCLLoss


def load_weights(encoder: PairEncoder, folder: Path) -> None:
    """Copies weights that ``encoder.save(folder)`` wrote back into the encoder."""
    saved = type(encoder.model).from_pretrained(folder, dtype=encoder.model.dtype)
    encoder.model.load_state_dict(saved.state_dict())
    state = read_json(folder / STATE_FILE)
    with torch.no_grad():
        for name in ("logit_scale", "logit_bias"):
            if getattr(encoder, name) is not None:
                getattr(encoder, name).fill_(state[name])


def share_out(positions: np.ndarray, each: int, rank: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares chosen rows of a super-batch out evenly; a row stays where it was read if that process has room.

    Args:
        positions: (size,) chosen rows of the super-batch.
        each: Rows that each process has read, those of process 0 first.
        rank: This process.
        processes: Number of processes, which divides ``size``.

    Returns:
        This process's rows that it has read, and those that it has not; together ``size / processes``.
    """
    room = len(positions) // processes
    owners = positions // each
    kept = [positions[owners == r][:room] for r in range(processes)]
    left = np.concatenate([positions[owners == r][room:] for r in range(processes)])
    start = sum(room - len(k) for k in kept[:rank])
    return kept[rank], left[start : start + room - len(kept[rank])]


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards every module's mode, every buffer and all random states are as before."""
    modes = {part: part.training for part in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = random.getstate(), np.random.get_state()  # what others draw from
    accelerators = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(accelerators):
        module.eval()
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            random.setstate(states[0])
            np.random.set_state(states[1])


def _identities(data: Any) -> list[tuple[Any, str]]:
    if isinstance(data, Pairs):
        return data.identities()
    rows = read(data, range(len(data)))
    return [(row["query"] if isinstance(row["query"], str) else i, row["key"]) for i, row in enumerate(rows)]


def _as_pairs(data: Any) -> Any:
    if data is None or isinstance(data, Pairs) or hasattr(data, "rows"):
        return data
    if hasattr(data, "column_names"):
        return pairs_of(data)
    return data


def _check_kind(encoder: PairEncoder, data: Any) -> None:
    kind = getattr(data, "kind", encoder.kind)
    if kind != encoder.kind:
        raise UserError(
            f"The model is an encoder of {encoder.kind.replace('-', ' and ')}, but the data are pairs of "
            f"{kind.replace('-', ' and ')}: name the fields of the data, or take another model."
        )
