"""A stream of tasks: trains on one after the other, measures all after each, and resumes where it was killed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import TrainingArguments

from modelwright.errors import UserError, did_you_mean
from modelwright.files import atomic_path, read_json, write_json
from modelwright.models.loading import resolve_device
from modelwright.progress import Progress, Silent
from modelwright.training.continual.ewc import ElasticWeights
from modelwright.training.continual.examples import correct, fit
from modelwright.training.continual.matrix import AccuracyMatrix
from modelwright.training.continual.options import ContinualOptions
from modelwright.training.continual.tasks import Example, Task, check_tasks, drawn
from modelwright.training.continual.trainer import ContinualTrainer, Passes
from modelwright.training.continual.tuning import Adaptation
from modelwright.training.gradient_mask import GradientMask
from modelwright.training.resume import latest_checkpoint
from modelwright.training.session import session, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MaskOptions(Protocol):
    """Options of a gradient mask, such as :class:`~modelwright.training.migu.MIGUConfig`."""

    active: bool

    def on(self, model: Any) -> GradientMask:
        """Returns the mask on a model."""


@dataclass
class StreamResult:
    """What came of a stream.

    Attributes:
        model: The trained model; adapters are merged. It is in evaluation mode.
        matrix: Accuracy on each task after each.
        log: Rows with task, step, loss, learning_rate, grad_norm, seconds.
        steps: Optimizer steps of each task.
        seconds: Wall time of the steps of each task.
    """

    model: Any = field(repr=False)
    matrix: AccuracyMatrix
    log: list[dict[str, Any]] = field(repr=False)
    steps: list[int]
    seconds: list[float]

    def summary(self) -> dict[str, Any]:
        """Returns accuracy, learning_accuracy, forgetting, backward_transfer, steps and train_seconds."""
        return {**self.matrix.summary(), "steps": sum(self.steps), "train_seconds": round(sum(self.seconds), 3)}


class ContinualBenchmark:
    """A stream of tasks in an order.

    Args:
        tasks: Tasks; see :func:`~modelwright.training.continual.read_stream`,
            :func:`~modelwright.training.continual.read_benchmark` and
            :func:`~modelwright.training.continual.world_tasks`.
        order: Their names in the order of training; as given by default.

    Raises:
        UserError: See :func:`~modelwright.training.continual.tasks.check_tasks`; or a name is unknown.
    """

    def __init__(self, tasks: Sequence[Task], order: Sequence[str] | None = None) -> None:
        named = {task.name: task for task in tasks}
        for name in order or ():
            if name not in named:
                raise UserError(f"There is no task '{name}' in the stream: {did_you_mean(name, named)}")
        self.tasks = [named[name] for name in order] if order is not None else list(tasks)
        check_tasks(self.tasks)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: ContinualOptions,
        *,
        mask: MaskOptions | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> StreamResult:
        """Trains ``model`` in place on all tasks; the same call after a crash finishes with the same result.

        Args:
            model: A causal language model in float32.
            tokenizer: Its tokenizer, with an end token.
            options: The run's options.
            mask: Options of a gradient mask, such as ``MIGUConfig()``.
            folder: Where what is needed to resume is kept; None keeps nothing.
            progress: Shows steps and accuracies.

        Raises:
            UserError: The options do not fit the model or each other, or training diverged.
            KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint is in ``folder``.
        """
        return _Run(self.tasks, model, tokenizer, options, mask, folder, progress or Silent()).result()


class _Run:
    def __init__(
        self,
        tasks: Sequence[Task],
        model: Any,
        tokenizer: Any,
        options: ContinualOptions,
        mask: MaskOptions | None,
        folder: Path | None,
        progress: Progress,
    ) -> None:
        options.check()
        if model.dtype != torch.float32:
            raise UserError(f"The model is in {model.dtype}: load it in float32; small updates are lost in fewer bits.")
        self.tasks, self.model, self.options = tasks, model, options
        self.mask, self.folder, self.progress = mask, folder, progress
        self.encoder, longest = fit(model, tokenizer, tasks, options.max_tokens)
        self.new_tokens = options.new_tokens or longest
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.leader = os.environ.get("RANK", "0") == "0"
        self.matrix = AccuracyMatrix([task.name for task in tasks])
        self.adaptation = Adaptation(options)
        self.elastic = ElasticWeights(options.ewc) if options.ewc else None
        self.log: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.seconds: list[float] = []

    def result(self) -> StreamResult:
        self._resume()
        if len(self.matrix.rows) < len(self.steps):
            self._measure(len(self.steps) - 1)
        for number in range(len(self.steps), len(self.tasks)):
            self._train(number)
            self._save()
            self._measure(number)
        self.model.eval()
        return StreamResult(self.model, self.matrix, self.log, self.steps, self.seconds)

    # One task.

    def _train(self, number: int) -> None:
        task, options = self.tasks[number], self.options
        self.progress.message(f"Task {number + 1} of {len(self.tasks)}: {task.name}")
        model = self.adaptation.begin(self.model, number)
        rows = [self.encoder.row(example) for example in (*task.train, *self._replayed(number))]
        per_step = options.batch_size * options.gradient_accumulation * self.processes
        steps = options.total_steps(len(rows), self.processes)
        mask = self.mask.on(model) if self.mask is not None else None
        if mask is not None:
            mask.active = mask.active and (number > 0 or options.mask_first_task)
        seed = options.seed * 10_007 + number
        folder = self.folder / f"task-{number}" if self.folder is not None else None
        smaller = (
            f"at batches of {options.batch_size} examples: use a smaller batch_size with more gradient_accumulation"
        )
        try:
            with session(options, model, folder, self.progress, smaller=smaller) as (work, companion):
                args = training_arguments(
                    TrainingArguments, options, work, steps, resolve_device(options.device), evaluate=False,
                    save=folder is not None, per_device_train_batch_size=options.batch_size, seed=seed,
                    gradient_accumulation_steps=options.gradient_accumulation, remove_unused_columns=False,
                    ddp_find_unused_parameters=False,
                )  # fmt: skip
                # Several visible GPUs without torchrun would mean DataParallel, whose copies no mask sees.
                args._n_gpu = min(args.n_gpu, 1)
                trainer = ContinualTrainer(
                    model=model, args=args, train_dataset=Passes(rows, steps * per_step, seed),
                    data_collator=self.encoder.batch, callbacks=[companion], mask=mask,
                    penalty=self._penalty(model) if self._penalised else None,
                )  # fmt: skip
                trainer.resume(latest_checkpoint(work))
        finally:
            if mask is not None:
                mask.remove()
        # Mixed precision wraps the forward method; the next task's trainer would wrap it again.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        self._keep_log(task.name, trainer)
        if self.elastic is not None:
            samples = drawn(rows[: len(task.train)], options.ewc_samples, seed)
            self.elastic.add(model, (self.encoder.batch([row]) for row in samples))
        self.model = self.adaptation.end(model, last=number == len(self.tasks) - 1)

    @property
    def _penalised(self) -> bool:
        return self.elastic is not None or self.options.tuning == "o-lora"

    def _penalty(self, model: Any) -> Any:
        def penalty() -> torch.Tensor | None:
            if self.elastic is not None:
                return self.elastic.penalty(model) if self.elastic.precision else None
            return self.adaptation.penalty(model)

        return penalty

    def _replayed(self, number: int) -> list[Example]:
        """The rows of earlier tasks that are trained on again: the same of a task in all that follow."""
        found: list[Example] = []
        for earlier, task in enumerate(self.tasks[:number]):
            if self.options.replay:
                count = max(1, round(self.options.replay * len(task.train)))
                found += drawn(task.train, count, self.options.seed * 10_007 + earlier)
        return found

    def _keep_log(self, name: str, trainer: ContinualTrainer) -> None:
        for entry in trainer.state.log_history:
            if "loss" in entry:
                kept = {k: entry[k] for k in ("step", "loss", "learning_rate", "grad_norm", "seconds") if k in entry}
                self.log.append({"task": name, **kept})
        self.steps.append(trainer.state.global_step)
        self.seconds.append(round(trainer.clock.total, 4))

    # Measuring.

    def _measure(self, number: int) -> None:
        self.model.eval()
        self.progress.start(f"after {self.tasks[number].name}", len(self.tasks))
        found = {}
        for task in self.tasks:
            mine = task.test[int(os.environ.get("RANK", "0")) :: self.processes]
            right = correct(
                self.model, self.encoder, mine, new_tokens=self.new_tokens, batch_size=self.options.eval_batch_size
            )
            found[task.name] = self._over_processes(right) / len(task.test)
            self.progress.advance(1, f"{task.name} {found[task.name]:.1%}")
        self.matrix.add(number, found)
        shown = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
        self.progress.message(f"After {self.tasks[number].name}: {shown}")
        if self.folder is not None and self.leader:
            write_json(self.folder / "rows.json", self.matrix.rows)
        self._meet()

    def _over_processes(self, count: int) -> int:
        if self.processes == 1:
            return count
        total = torch.tensor([count], device=next(self.model.parameters()).device)
        torch.distributed.all_reduce(total)
        return int(total)

    def _meet(self) -> None:
        if self.processes > 1:
            torch.distributed.barrier()

    # Resuming at the border of two tasks; within a task the trainer's checkpoints do it.

    def _save(self) -> None:
        if self.folder is None:
            return
        done = len(self.steps)
        if self.leader:
            with atomic_path(self.folder / f"state-{done}", force=True) as partial:
                partial.mkdir()
                save_model(self.model, str(partial / "model.safetensors"))
                tensors = {f"lora.{k}": v for k, v in self.adaptation.state().items()}
                if self.elastic is not None:
                    tensors |= {f"ewc.{k}": v for k, v in self.elastic.state().items()}
                save_file({k: v.contiguous() for k, v in tensors.items()}, partial / "method.safetensors")
                write_json(partial / "state.json", {"log": self.log, "steps": self.steps, "seconds": self.seconds})
            for path in [*self.folder.glob("state-*"), *self.folder.glob("task-*")]:
                if path.name != f"state-{done}":
                    shutil.rmtree(path, ignore_errors=True)
        self._meet()

    def _resume(self) -> None:
        if self.folder is None:
            return
        states = [
            (int(found[1]), path)
            for path in self.folder.glob("state-*")
            if (found := re.fullmatch(r"state-(\d+)", path.name))
        ]
        if not states:
            return
        done, path = max(states)
        state = read_json(path / "state.json")
        self.log, self.steps, self.seconds = state["log"], state["steps"], state["seconds"]
        if self.options.tuning == "lora" and done < len(self.tasks):
            self.model = self.adaptation.begin(self.model, 0)
        load_model(self.model, path / "model.safetensors")
        tensors = load_file(path / "method.safetensors")
        self.adaptation.load({k[5:]: v for k, v in tensors.items() if k.startswith("lora.")})
        if self.elastic is not None:
            device = resolve_device(self.options.device)
            self.elastic.load({k[4:]: v for k, v in tensors.items() if k.startswith("ewc.")}, device)
        self.model.to(resolve_device(self.options.device))
        rows = self.folder / "rows.json"
        self.matrix.rows = read_json(rows)[:done] if rows.is_file() else []


def has_state(folder: Path) -> bool:
    """Returns whether a folder holds anything that a run could be resumed from."""
    tasks = [path for path in folder.glob("task-*") if latest_checkpoint(path) is not None]
    return bool(tasks) or any(folder.glob("state-*"))
