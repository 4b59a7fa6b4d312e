"""lm-eval's tasks through any decoding method."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError, did_you_mean, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelwright.decoding.parts import Parts


def find_tasks(tasks: Sequence[str], include_path: Sequence[str | Path] = ()) -> Any:
    """Returns lm-eval's task manager, which knows all the tasks.

    Its own 14,000 files are read only if a name is not among the user's.

    Args:
        tasks: Names of tasks, groups or tags; patterns may be used.
        include_path: Folders with tasks of the user's.

    Raises:
        UserError: lm-eval is not installed, a folder does not exist, or a task does not.
    """
    require("lm_eval", "lm-eval", "lm-eval's tasks")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not tasks:
        raise UserError("There are no tasks: name them with --tasks.")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is no folder of task files: check --include-path.")
    own = [str(folder) for folder in include_path] or None
    for defaults in (False, True):
        if not defaults and own is None:
            continue
        manager = TaskManager(include_path=own, include_defaults=defaults)
        missing = [task for task in tasks if not manager.match_tasks([task])]
        if not missing:
            return manager
    raise UserError(
        f"lm-eval has no task '{missing[0]}': {did_you_mean(missing[0], manager.all_tasks)} Tasks of your own are "
        f"found by --include-path."
    )


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    parts: Parts | None = None,
    include_path: Sequence[str | Path] = (),
    manager: Any = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
    system: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    run_code: bool = False,
) -> dict[str, Any]:
    """Runs tasks of lm-eval.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        tasks: Names.
        parts: Decoding methods; log-likelihoods and generated text both go through them.
        include_path: Folders with tasks of the user's.
        manager: What :func:`find_tasks` returned, if it was called before.
        num_fewshot: Examples before each question, if not the task's own number.
        limit: Documents of each task.
        batch_size: Requests at once.
        chat: Whether to lay out by the chat template.
        system: System message.
        max_length: Longest input in tokens; the model's own by default.
        seed: Of the choice of examples and of draws.
        run_code: Whether tasks that run what the model wrote may do so.

    Returns:
        lm-eval's results, JSON-able, and ``samples`` by task.

    Raises:
        UserError: See :func:`find_tasks`; a data set cannot be loaded; the methods do not go with the model.
    """
    manager = manager or find_tasks(tasks, include_path)
    import lm_eval

    from modelwright.decoding.parts import Parts
    from modelwright.evaluation.harness_model import MethodLM

    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    _load_all(manager, tasks)
    wrapped = MethodLM(
        pretrained=model, methods=parts or Parts(), tokenizer=tokenizer, batch_size=batch_size, max_length=max_length,
        device=str(model.device),
    )  # fmt: skip
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit,
            apply_chat_template=chat, system_instruction=system, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed, confirm_run_unsafe_code=run_code,
            bootstrap_iters=1000,
        )  # fmt: skip
    except AssertionError as error:  # how lm-eval says that an answer's room is all that the model has, and the like
        raise UserError(f"lm-eval refuses: {error}") from error
    finally:
        wrapped.close()
    plain: dict[str, Any] = _plain({k: v for k, v in found.items() if k not in ("samples", "config")})
    return {**plain, "samples": _plain(found.get("samples") or {})}


def _load_all(manager: Any, tasks: Sequence[str]) -> None:
    """Loads every task once, to tell a data set that cannot be had from a fault in the middle of the work."""
    for task in tasks:
        try:
            manager.load(task)
        except UserError:
            raise
        except Exception as error:  # whatever datasets, the hub or a task's own code raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"The task '{task}' cannot be loaded, most likely because its data set cannot be: {reason[:300]}"
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
