"""``transformers.Trainer`` for packed causal language models: exact resumption, our log, no idle work in a step."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from modelwright.errors import UserError
from modelwright.progress import Progress
from modelwright.training.options import TrainingOptions

#: Written last into a checkpoint: one without it was cut short and is not resumed from.
_COMPLETE = "modelwright.json"
#: Seconds between updates of the progress bar.
_SHOWN_EVERY = 0.2
_DECAYED = (nn.Linear, nn.Embedding, nn.Conv1d, Conv1D)


def rate(step: int, total: int, options: TrainingOptions) -> float:
    """Returns the learning rate of a step (from 0) over the peak."""
    warmup = options.warmup_steps(total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if options.schedule == "cosine" else 1 - done
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * shape


def decayed_parameters(model: nn.Module) -> list[str]:
    """Returns the names of the parameters with weight decay: weights of linear maps, convolutions and embeddings."""
    return [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, _DECAYED)
    ]


class Clock:
    """Seconds of training, without those of evaluating and saving."""

    def __init__(self) -> None:
        self.total, self._since = 0.0, time.perf_counter()

    def read(self) -> float:
        """Returns the seconds so far."""
        return self.total + time.perf_counter() - self._since

    def start(self) -> None:
        """Runs on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stands still until :meth:`start`."""
        self.total = self.read()


class CausalTrainer(Trainer):
    """The loop. What is overridden here either makes resumption exact or spares work that no step needs.

    Args:
        evaluate_with: Called with the model; returns metrics for the log.
        options: The run's options.
        keys: As for ``Trainer``.
    """

    def __init__(
        self, *, options: TrainingOptions, evaluate_with: Callable[[nn.Module], dict[str, float]] | None, **keys: Any
    ) -> None:
        super().__init__(**keys)
        self.options, self.evaluate_with = options, evaluate_with
        self.clock = Clock()
        self._losses: list[torch.Tensor | float] = []
        self._parameters: list[nn.Parameter] = []
        # All blocks have the same length, so a mean of means is exact, and counting labels in each step is not needed.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # PackedBlocks has the order of the blocks

    def get_decay_parameter_names(self, model: nn.Module, *args: Any) -> list[str]:
        """See :func:`decayed_parameters`."""
        return decayed_parameters(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of :func:`rate`."""
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate(step, num_training_steps, self.options)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks over all parameters in each step."""
        return 0

    def _prepare_for_training(self, *args: Any, **keys: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **keys)
        prepared[0].train()
        self._parameters = [p for p in prepared[0].parameters() if p.requires_grad]
        self.clock.start()
        return prepared

    def training_step(self, *args: Any, **keys: Any) -> torch.Tensor:
        """One forward and backward pass; keeps the loss for the log without waiting for it."""
        loss = self._plain_step(*args, **keys) if self._is_plain else super().training_step(*args, **keys)
        self._losses.append(loss)
        return loss

    @property
    def _is_plain(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.NO and self.accelerator.scaler is None

    def _plain_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # On one device this is all there is to do. The general step also walks over all modules and looks for an
        # installed package each time: 3% of a step of a small model.
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._is_plain:
            return super()._clip_grad_norm(model)
        return nn.utils.clip_grad_norm_(self._parameters, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens and seconds. The loss is the mean since the last row, also when a checkpoint lay between."""
        if "loss" in logs:
            logs["loss"] = self._take_loss()
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"The loss is {logs['loss']} at step {self.state.global_step}: training diverged; "
                    f"try a smaller learning rate, or a longer warm-up."
                )
        blocks = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        logs["tokens"] = self.state.global_step * blocks * self.options.block_size
        logs["seconds"] = round(self.clock.read(), 3)
        super().log(logs)

    def _take_loss(self) -> float:
        values = [float(v) for v in self._losses]
        self._losses.clear()
        mean = math.fsum(values) / len(values) * self.args.gradient_accumulation_steps
        if self.args.world_size > 1:
            return float(self.accelerator.gather(torch.tensor([mean], device=self.args.device)).mean())
        return mean

    def evaluate(self, *args: Any, **keys: Any) -> dict[str, float]:
        """Bits per byte of the held-out text."""
        assert self.evaluate_with is not None
        self.clock.stop()
        self.model.eval()
        metrics = self.evaluate_with(self.model)
        self.model.train()
        self.clock.start()
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.clock.stop()
        self._losses = [float(v) for v in self._losses]
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (folder / _COMPLETE).write_text(json.dumps({"losses": self._losses, "seconds": self.clock.total}))
        self.clock.start()

    def resume(self, checkpoint: Path | None) -> None:
        """Trains, from a checkpoint if there is one."""
        if checkpoint is not None:
            state = json.loads((checkpoint / _COMPLETE).read_text())
            self._losses, self.clock.total = state["losses"], state["seconds"]
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.clock.stop()


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint and removes those that were cut short."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / _COMPLETE).is_file():
            found.append((int(match[1]), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


class Companion(TrainerCallback):
    """Shows progress, saves by the clock, and turns Ctrl-C and SIGTERM into a checkpoint and an end.

    Args:
        progress: Where to show.
        save_minutes: Minutes between checkpoints; 0 for none.
        can_save: Whether there is a folder for checkpoints.
    """

    def __init__(self, progress: Progress, save_minutes: float, can_save: bool) -> None:
        self.progress, self.can_save = progress, can_save
        self.interval = save_minutes * 60 if can_save else 0.0
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._saved = self._shown = time.monotonic()
        self._steps, self._note = 0, ""

    def __enter__(self) -> Companion:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt  # asked twice: at once
        self.signal = number

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **keys: Any) -> None:
        """Starts the bar where the checkpoint left it."""
        self.progress.start("train", state.max_steps)
        if state.global_step:
            self.progress.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **keys: Any) -> None:
        """Counts the step."""
        self._steps += 1
        now = time.monotonic()
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last row, whatever the interval
        if now - self._shown >= _SHOWN_EVERY or state.global_step >= state.max_steps:
            self.progress.advance(self._steps, self._note)
            self._steps, self._shown = 0, now
        wish = (self.signal is not None, bool(self.interval) and now - self._saved > self.interval)
        if args.world_size > 1:
            # All processes must save and stop at the same step. Asking costs a wait for the device: not in each step.
            if state.global_step % 10:
                return
            wish = _any_process(wish)
        if wish[0]:
            control.should_training_stop = True
        if any(wish) and self.can_save:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **keys: Any) -> None:
        """Restarts the interval."""
        self._saved = time.monotonic()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **keys: Any) -> None:
        """Keeps the newest numbers for the bar."""
        if "loss" in logs:
            self._note = f"loss {logs['loss']:.3f}"
        if "eval_bits_per_byte" in logs:
            self.progress.message(f"step {state.global_step}: {logs['eval_bits_per_byte']:.4f} bits per byte")


def _any_process(wish: tuple[bool, bool]) -> tuple[bool, bool]:
    from accelerate import PartialState
    from accelerate.utils import gather

    flags = torch.tensor([wish], dtype=torch.int32, device=PartialState().device)
    stop, save = gather(flags).sum(0).tolist()
    return bool(stop), bool(save)
