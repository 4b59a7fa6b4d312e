"""What a run leaves and finds again: checkpoints, the folder around them, and a ``Trainer`` that goes on exactly."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from modelwright.errors import UserError
from modelwright.files import atomic_path, read_json, write_json
from modelwright.progress import Progress

#: Written last into a checkpoint: one without it was cut short and is not resumed from.
_COMPLETE = "modelwright.json"
#: Seconds between updates of the progress bar.
_SHOWN_EVERY = 0.2
_DECAYED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)


def decayed_parameters(model: nn.Module) -> list[str]:
    """Returns the names of the parameters with weight decay: weights of linear maps, convolutions and embeddings."""
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, _DECAYED):
            found.append(f"{prefix}.weight" if prefix else "weight")
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append(f"{prefix}.in_proj_weight" if prefix else "in_proj_weight")
    return found


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


class ResumableTrainer(Trainer):
    """A ``Trainer`` whose log and schedule are the same whether or not the run was cut short on the way.

    Args:
        rate: From a step (from 0) and the number of steps to the learning rate over the peak; None leaves the schedule
            to the training arguments.
        keys: As for ``Trainer``.
    """

    def __init__(self, *, rate: Callable[[int, int], float] | None = None, **keys: Any) -> None:
        super().__init__(**keys)
        self.rate = rate
        self.clock = Clock()
        self._losses: list[torch.Tensor | float] = []
        #: Further numbers of each step since the last row of the log, which shows their means.
        self._noted: dict[str, list[torch.Tensor | float]] = {}

    def get_decay_parameter_names(self, model: nn.Module, *args: Any) -> list[str]:
        """See :func:`decayed_parameters`."""
        return decayed_parameters(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of ``rate``."""
        if self.rate is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if getattr(self, "lr_scheduler", None) is None:
            shape = self.rate
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: shape(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks over all parameters in each step."""
        return 0

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared[0].train()
        if resume_from_checkpoint and (path := Path(resume_from_checkpoint) / _COMPLETE).is_file():
            state = json.loads(path.read_text())
            self._losses, self._noted, self.clock.total = state["losses"], state["noted"], state["seconds"]
        self.clock.start()
        return prepared

    def progress_made(self) -> dict[str, float]:
        """What every row of the log says of how far training is, such as the number of tokens."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how far it is. The loss is the mean since the last row, also when a checkpoint lay between."""
        if "loss" in logs:
            logs["loss"] = self._take_loss()
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"The loss is {logs['loss']} at step {self.state.global_step}: training diverged; "
                    f"try a smaller learning rate, or a longer warm-up."
                )
            logs.update({name: _mean(values) for name, values in self._noted.items()})
            self._noted.clear()
        logs.update(self.progress_made())
        logs["seconds"] = round(self.clock.read(), 3)
        super().log(logs, start_time)

    def _take_loss(self) -> float:
        mean = _mean(self._losses) * self.args.gradient_accumulation_steps
        self._losses.clear()
        if self.args.world_size > 1:
            return float(self.accelerator.gather(torch.tensor([mean], device=self.args.device)).mean())
        return mean

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.clock.stop()
        self._losses = list(self._over_processes([float(v) for v in self._losses]))
        self._noted = {name: [float(v) for v in values] for name, values in self._noted.items()}
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state = {"losses": self._losses, "noted": self._noted, "seconds": self.clock.total}
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            # At once or not at all: killed between the file and its words, no run could go on from here.
            with atomic_path(folder / _COMPLETE, force=True) as partial:
                partial.write_text(json.dumps(state))
        self.clock.start()

    def _over_processes(self, values: list[float]) -> list[float]:
        """The mean over the processes: one of them writes the checkpoint that all go on from."""
        if self.args.world_size == 1 or not values:
            return values
        mine = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.gather(mine).view(self.args.world_size, -1).mean(0).tolist()

    def resume(self, checkpoint: Path | None) -> None:
        """Trains, from a checkpoint if there is one."""
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.clock.stop()


def _mean(values: list[Any]) -> float:
    return math.fsum(float(v) for v in values) / len(values)


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint and removes those that were cut short."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / _COMPLETE).is_file():
            found.append((int(match[1]), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


@contextlib.contextmanager
def working_folder(
    output: Path,
    plan: dict[str, Any],
    force: bool,
    leader: bool = True,
    holds_work: Callable[[Path], Any] = latest_checkpoint,
) -> Iterator[Path]:
    """Yields ``<output>.training``, where a run keeps what it needs to resume; the caller removes it when done.

    Args:
        output: The model folder that is being made.
        plan: Everything that the result depends on; a run of another plan is not resumed, and is in the way once it
            has saved a checkpoint.
        force: Whether to discard such a run.
        leader: Whether this is the process of a distributed run that writes.
        holds_work: Whether a folder has something that a resumed run need not do again.

    Raises:
        UserError: Another process is at work there, or the run there has another plan and ``force`` is off.
    """
    from filelock import FileLock, Timeout

    folder = output.with_name(output.name + ".training")
    if not leader:
        yield folder
        return
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"Another process is training {output} at this moment: wait for it, or choose another output."
        ) from error
    try:
        plan = json.loads(json.dumps(plan, default=str))
        path = folder / "plan.json"
        if folder.exists() and not path.exists():
            shutil.rmtree(folder)  # cut short before anything was done
        if path.exists() and (differing := _differences(read_json(path), plan)):
            if holds_work(folder) and not force:
                raise UserError(
                    f"{folder} holds an unfinished run with other options ({', '.join(differing)}): repeat that "
                    f"command to finish it, or give --force to discard it."
                )
            shutil.rmtree(folder)
        try:
            write_json(path, plan)
            yield folder
        except (UserError, OSError):
            # Nothing was trained, so nothing is to be resumed: the mended command must not find this in its way.
            if not holds_work(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        # Removed before it is released: afterwards it could be another run's lock already.
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        return ["plan.json"]
    return sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))


class Companion(TrainerCallback):
    """Shows progress, saves by the clock, and turns Ctrl-C and SIGTERM into a checkpoint and an end.

    Args:
        progress: Where to show.
        save_minutes: Minutes between checkpoints; 0 for none.
        can_save: Whether there is a folder for checkpoints.
        ask_every: Steps between asking the other processes of a distributed run whether to save or stop, which costs a
            wait for the device.
    """

    def __init__(self, progress: Progress, save_minutes: float, can_save: bool, ask_every: int = 10) -> None:
        self.progress, self.can_save, self.ask_every = progress, can_save, ask_every
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
            # All processes must save and stop at the same step.
            if state.global_step % self.ask_every:
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
