"""Training what an editor needs before it can edit (MEND's networks, SERAC's classifier and small model).

Step ``t`` sees the same examples whatever happened before, and a checkpoint holds the optimizer too: a run that was
killed ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modelwright.editing.editor import Editor
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.requests import EditRequest
from modelwright.editing.subject import encode_prompt
from modelwright.errors import UserError
from modelwright.files import atomic_path, read_json, write_json
from modelwright.models.scoring import context_length
from modelwright.options import Arg
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TENSORS, _STATE = "state.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train and how.

    Attributes:
        steps: Examples at most.
        accumulate: Examples whose gradients are summed before the optimizer moves.
        clip: Largest norm of that sum.
        eval_every: Examples between two looks at the validation loss.
        patience: Examples without a better validation loss after which training stops.
        save_seconds: Between checkpoints.
    """

    steps: int
    accumulate: int = 10
    clip: float = 100.0
    eval_every: int = 5_000
    patience: int = 40_000
    save_seconds: float = 120.0

    def check(self) -> None:
        """Raises :class:`UserError` for a value that makes no sense."""
        if min(self.steps, self.accumulate, self.eval_every, self.patience) < 1:
            raise UserError("steps, accumulate, eval_every and patience must all be at least 1.")
        if not self.clip > 0:
            raise UserError(f"The largest norm of the gradient must be above 0, not {self.clip}.")


@dataclass(kw_only=True)
class TrainedEditor(Editor):
    """Options of the editors that are trained before they edit."""

    steps: Annotated[int, Arg("Training: edits at most.")] = 100_000
    learning_rate: Annotated[float, Arg("Training: Adam's learning rate.")] = 1e-5
    edit_weight: Annotated[float, Arg("Training: weight of the loss of what an edit should do.")] = 0.1
    locality_weight: Annotated[float, Arg("Training: weight of the divergence elsewhere.")] = 1.0
    accumulate: Annotated[int, Arg("Training: edits whose gradients are summed for a step.")] = 10
    clip: Annotated[float, Arg("Training: largest norm of that sum.")] = 100.0
    eval_every: Annotated[int, Arg("Training: edits between two looks at the held-out loss.")] = 5_000
    patience: Annotated[int, Arg("Training: edits without a better held-out loss before it stops.")] = 40_000
    seed: Annotated[int, Arg("Training: seed of the start and of the order.")] = 0

    #: Further options that the outcome of the training depends on.
    shapes_training: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise UserError("learning_rate must be above 0.")

    def schedule(self) -> Schedule:
        """Returns how long to train, and how."""
        return Schedule(**{f.name: getattr(self, f.name) for f in fields(Schedule) if hasattr(self, f.name)})

    def settings(
        self, model: PreTrainedModel, requests: Sequence[EditRequest], locality: Sequence[str]
    ) -> dict[str, Any]:
        """Returns what the outcome of the training depends on, JSON-able; checkpoints of others are refused."""
        named = ("steps", "learning_rate", "edit_weight", "locality_weight", "accumulate", "clip", "seed")
        values = {name: getattr(self, name) for name in (*named, *self.shapes_training)}
        return {
            **{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()},
            "model": model_fingerprint(model), "requests": [r.to_dict() for r in requests], "locality": list(locality),
        }  # fmt: skip


def learn(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], torch.Tensor],
    schedule: Schedule,
    *,
    validate: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a module in place; at the end it has the weights with the best validation loss.

    Args:
        module: What is trained and kept; its buffers are kept too.
        optimizer: Over its parameters.
        loss: From the number of a step, from 0, to that example's loss.
        schedule: How long.
        validate: Returns a loss on held-out examples; without it the last weights are kept.
        checkpoint: Folder to continue from and to save to, or None.
        settings: What the run depends on; a checkpoint with other settings is refused.
        progress: Where to tell.

    Returns:
        ``steps``, ``loss`` (mean of the last hundred), ``best_step``, ``best_validation_loss``, ``resumed_from``.

    Raises:
        UserError: The loss is not finite, or the checkpoint is of another run.
    """
    schedule.check()
    progress = progress or Silent()
    state: dict[str, Any] = {"step": 0, "best_step": 0, "best": None, "losses": []}
    best: dict[str, torch.Tensor] = {}
    if checkpoint is not None and (checkpoint / _STATE).is_file():
        state, best = _load(checkpoint, module, optimizer, settings)
    resumed = state["step"]
    if validate is not None and state["best"] is None:
        state["best"], best = validate(), _copy(module)
    progress.start("training the editor", schedule.steps)
    progress.advance(resumed)
    saved = time.monotonic()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    while state["step"] < schedule.steps and state["step"] - state["best_step"] < schedule.patience:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(min(schedule.accumulate, schedule.steps - state["step"])):
            value = loss(state["step"])
            if not bool(torch.isfinite(value)):
                raise UserError(
                    f"The loss is {float(value.detach())} at step {state['step']}: training diverged; "
                    f"lower the learning rate."
                )
            value.backward()
            state["step"] += 1
            state["losses"] = [*state["losses"][-99:], float(value.detach())]
            progress.advance(1, f"loss {sum(state['losses']) / len(state['losses']):.4g}")
        torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        last = state["step"] >= schedule.steps
        due = state["step"] // schedule.eval_every > (state["step"] - schedule.accumulate) // schedule.eval_every
        if validate is None:
            state["best_step"] = state["step"]
        elif (due or last) and (now := validate()) < state["best"]:
            state["best"], state["best_step"], best = now, state["step"], _copy(module)
        if checkpoint is not None and time.monotonic() - saved > schedule.save_seconds:
            _save(checkpoint, module, optimizer, state, best, settings)
            saved = time.monotonic()
    if best:
        module.load_state_dict(best)
    losses = state["losses"]
    return {
        "steps": state["step"],
        "loss": sum(losses) / len(losses) if losses else math.nan,
        "best_step": state["best_step"],
        "best_validation_loss": state["best"],
        "resumed_from": resumed,
    }


def order(seed: int, count: int, step: int) -> int:
    """Returns which of ``count`` examples a step sees: all of them in each pass, in an order of that pass's own."""
    turn, place = divmod(step, count)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % (1 << 63))
    return int(torch.randperm(count, generator=generator)[place])


def _copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    best: dict[str, torch.Tensor],
    settings: dict[str, Any] | None,
) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in values.items()}
    with atomic_path(folder, force=True) as partial:
        partial.mkdir()
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial / _TENSORS)
        write_json(partial / _STATE, {**state, "settings": settings or {}})


def _load(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    state = read_json(folder / _STATE)
    if state.pop("settings") != (settings or {}):
        raise UserError(
            f"{folder} holds an unfinished training with other options: repeat those, or discard it with --force."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
    for name, tensor in load_file(folder / _TENSORS).items():
        kind, rest = name.split(".", 1)
        parts[kind][rest] = tensor
    module.load_state_dict(parts["module"])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, field = name.split(".")
        moments.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return state, parts["best"]


def mean_loss(losses: Sequence[torch.Tensor]) -> float:
    """Returns the mean of scalar losses, in float64; infinite if one is not finite."""
    total = sum(float(loss) for loss in losses) / len(losses)
    return total if math.isfinite(total) else math.inf


@dataclass(frozen=True)
class Lesson:
    """What one step of training sees.

    Attributes:
        request: The edit that is made.
        prompt: What is asked after it: the request's prompt or a paraphrase.
        elsewhere: A text that the edit must not touch.
        others: Further requests, to be in memory beside this one.
    """

    request: EditRequest
    prompt: str
    elsewhere: str
    others: tuple[EditRequest, ...]


class Lessons:
    """Requests and untouched texts, drawn step by step, with some requests held out for validation.

    Args:
        requests: Facts to train on. Their paraphrases are what generalisation is learned from.
        locality: Texts that no edit must touch; by default the other requests' prompts with today's answers.
        seed: Of the order.
        others: How many further requests a lesson has.

    Raises:
        UserError: There are too few requests.
    """

    def __init__(
        self, requests: Sequence[EditRequest], locality: Sequence[str] = (), seed: int = 0, others: int = 0
    ) -> None:
        if len(requests) < 2:
            raise UserError(f"There are {len(requests)} requests to train an editor on: give at least 2.")
        held_out = len(requests) // 10
        self.locality = tuple(text for text in locality if text.strip())
        if locality and not self.locality:
            raise UserError("All texts for locality are blank: give texts that edits must not touch.")
        self.training = tuple(requests[: len(requests) - held_out])
        self.validation = tuple(requests[len(requests) - held_out :])
        self.seed, self.others = seed, others

    def at(self, step: int) -> Lesson:
        """Returns the lesson of a step, which depends on nothing but the step and the seed."""
        return self._lesson(self.training, order(self.seed, len(self.training), step), step)

    def held_out(self) -> list[Lesson]:
        """Returns one lesson for each request that is held out."""
        return [self._lesson(self.validation, i, i) for i in range(len(self.validation))]

    def _lesson(self, pool: Sequence[EditRequest], index: int, step: int) -> Lesson:
        request = pool[index]
        prompts = [request.text, *request.paraphrase_texts()]
        rest = [r for r in self.training if r.text != request.text and r.subject != request.subject] or [
            r for r in self.training if r.text != request.text
        ]
        if not rest:
            raise UserError("All requests to train on have the same prompt: give different ones.")
        seed = self.seed + 1
        if self.locality:
            elsewhere = self.locality[order(seed, len(self.locality), step)]
        else:
            other = rest[order(seed, len(rest), step)]
            elsewhere = other.text + (f" {other.old_answer.strip()}" if other.old_answer else "")
        places = [order(seed + 1 + k, len(rest), step) for k in range(self.others)]
        return Lesson(request, prompts[step % len(prompts)], elsewhere, tuple(rest[place] for place in places))


def plain_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Returns ``input_ids`` and ``attention_mask`` (n, length) of texts, padded on the right, on the model's device."""
    longest = context_length(model) or 1 << 30
    rows = [encode_prompt(tokenizer, text)[:longest] for text in texts]
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
