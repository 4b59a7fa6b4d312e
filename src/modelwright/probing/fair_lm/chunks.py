"""Loss of each token without the logits of a whole batch: a part at a time, through the model's own head."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from modelwright.errors import UserError
from modelwright.models.roles import unwrap

#: Logits (numbers) that are there at once: 64 MiB in float32, whatever the vocabulary.
CHUNK = 1 << 24


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each target and whether it had the largest logit (the first one, where several are equal).

    Args:
        logits: (n, V), any floating-point dtype; 16 bits are brought to float32 first.
        targets: (n,) int64.

    Returns:
        (n,) nats in float32 (float64 for float64 logits), and (n,) bool.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    top, best = logits.max(-1)
    picked = logits.gather(-1, targets[:, None])[:, 0]
    # The largest logit is there already, so this spares logsumexp its own search, and never gives a loss below 0.
    nll = (logits - top[:, None]).exp_().sum(-1).log_() + (top - picked)
    return nll, best == targets


def token_losses(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns :func:`cross_entropy` at chosen places of a batch's logits, a bounded number at a time.

    Args:
        logits: (batch, length, V).
        rows: (n,) int64, batch index of each prediction.
        positions: (n,) int64, position whose logits predict.
        targets: (n,) int64, the type that came.
    """
    rows, positions, targets = (t.to(logits.device) for t in (rows, positions, targets))
    return _in_chunks(lambda at: logits[rows[at], positions[at]], targets, logits.shape[-1])


def _in_chunks(
    project: Callable[[slice], torch.Tensor], targets: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    step = max(1, CHUNK // width)
    parts = []
    for start in range(0, len(targets), step):
        at = slice(start, start + step)
        parts.append(cross_entropy(project(at), targets[at]))
    if not parts:
        return torch.zeros(0, device=targets.device), torch.zeros(0, dtype=torch.bool, device=targets.device)
    return torch.cat([nll for nll, _ in parts]), torch.cat([hit for _, hit in parts])


class ChunkedModel:
    """Losses of a causal language model whose vocabulary is too large for a batch's logits.

    The body runs once; then the model's own ``forward`` runs on parts of the hidden states, with its body replaced by
    one that returns them. So whatever a family does around its head (softcapping in Gemma 2, scaling in Cohere and
    Granite, casts) is done by its own code, and no list of families is needed. A model that has no separate body, or
    is of another package's code, is run as a whole. Adapters and data-parallel wrappers are seen through; sharded
    models are refused.

    Args:
        model: A causal language model, in evaluation mode.

    Raises:
        UserError: Its parameters are sharded over processes, or it reads learned prompts.
    """

    def __init__(self, model: Any) -> None:
        _refuse_sharded(model)
        self.model = unwrap(model)
        body = getattr(self.model, getattr(self.model, "base_model_prefix", "") or "-", None)
        # A forward of foreign code might do more than call its body and its head, and nobody would notice.
        known = type(self.model).__module__.split(".")[0] in ("transformers", "modelwright")
        self.body = body if known and isinstance(body, nn.Module) else None

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        head = self.model.get_output_embeddings()
        head = getattr(head, "base_layer", head)
        if (width := getattr(head, "out_features", None)) is not None:  # a quantized weight has another shape
            return int(width)
        weight = getattr(head, "weight", None)
        return int(weight.shape[0] if weight is not None else self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def losses(
        self, inputs: Mapping[str, torch.Tensor], rows: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the model and returns what :func:`token_losses` would of its logits.

        Args:
            inputs: What the model is called with, such as ``input_ids`` (batch, length); without labels.
            rows: (n,) int64, batch index of each prediction.
            positions: (n,) int64, position whose output predicts.
            targets: (n,) int64, the type that came.
        """
        options: dict[str, Any] = {**inputs, "use_cache": False}
        if self.body is None:
            return token_losses(self.model(**options).logits, rows, positions, targets)
        found = self.body(**options)
        hidden = getattr(found, "last_hidden_state", None)
        if hidden is None:
            return token_losses(self.model(**options).logits, rows, positions, targets)
        hidden = hidden[rows.to(hidden.device), positions.to(hidden.device)]
        with self._head(found, options["input_ids"]) as head:
            return _in_chunks(lambda at: head(hidden[at]), targets.to(hidden.device), self.vocab_size)

    @contextlib.contextmanager
    def _head(self, found: Any, ids: torch.Tensor) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yields the function from hidden states (n, width) to logits (n, V) that the model's ``forward`` ends with."""
        body = self.body
        assert body is not None
        mine = body.__dict__.get("forward")
        given = copy.copy(found)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            given["last_hidden_state"] = given.last_hidden_state = hidden[None]
            return self.model(input_ids=ids[:1, :1], use_cache=False).logits[0]

        try:
            body.forward = lambda *args, **keys: given
            yield head
        finally:
            del body.forward
            if mine is not None:  # such as accelerate's, which moves inputs between devices
                body.forward = mine


def _refuse_sharded(model: Any) -> None:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError("The model reads learned prompts (prompt or prefix tuning), which are not measured.")
    kinds = {type(module).__name__ for module in model.modules()}
    sharded = "FullyShardedDataParallel" in kinds or any(
        hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in model.parameters()
    )
    if sharded:
        raise UserError(
            "The model's parameters are sharded over processes (FSDP or DeepSpeed ZeRO-3), which is not supported "
            "here: measure its saved checkpoint with `modelwright probe token-loss`."
        )
