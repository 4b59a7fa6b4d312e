"""FT-L and FT-M: gradient descent on one MLP's down projection (arXiv 2410.16251, 2202.05262)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch.func import functional_call

from modelwright.editing.deltas import Dense
from modelwright.editing.edit import WeightEdit, check_editable
from modelwright.editing.editor import Editor
from modelwright.editing.examples import Examples, check_finite, make_examples, target_loss, trainable_only
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.mlp import chosen_layer, down_projection
from modelwright.editing.requests import EditRequest, check_requests
from modelwright.errors import UserError
from modelwright.models.roles import unwrap
from modelwright.options import Arg
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class _FineTune(Editor):
    layer: Annotated[int | None, Arg("Layer whose MLP is trained; 21 of 32 by default.")] = None
    learning_rate: Annotated[float, Arg("Adam's learning rate.")] = 5e-4
    steps: Annotated[int, Arg("Passes over the requests at most.")] = 25
    stop_loss: Annotated[float, Arg("Stop once a pass's mean loss is below this; such a batch takes no step.")] = 1e-2
    batch_size: Annotated[int, Arg("Requests a step.")] = 1
    norm_constraint: Annotated[float | None, Arg("Largest change of any one weight; none for no bound.")] = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError("steps and batch_size must be at least 1.")
        bound = 1.0 if self.norm_constraint is None else self.norm_constraint
        if not (0 < self.learning_rate < math.inf and bound > 0):
            raise UserError("learning_rate and norm_constraint must be above 0.")

    def _loss(self, logits: torch.Tensor, examples: Examples) -> torch.Tensor:
        raise NotImplementedError

    def _inputs(self, examples: Examples) -> dict[str, Any]:
        return examples.inputs

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> WeightEdit:
        """See :meth:`Editor.fit`. The matrix is trained in float32 whatever the model's dtype.

        ``details`` has the layer, the passes made, each pass's mean loss, and the largest change of a weight.
        """
        check_requests(requests)
        inner, layer = unwrap(model), chosen_layer(model, self.layer, 21)
        name = f"{down_projection(model, layer).name}.weight"
        check_editable(model, name)
        original = dict(inner.named_parameters())[name].detach()
        weight = original.float().clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=self.learning_rate)
        batches = [
            make_examples(model, tokenizer, [(r.text, r.target) for r in requests[at : at + self.batch_size]])
            for at in range(0, len(requests), self.batch_size)
        ]
        losses: list[float] = []
        with trainable_only(model), torch.enable_grad():
            for _ in range(self.steps):
                total = 0.0
                for examples in batches:
                    out = functional_call(inner, {name: weight.to(original.dtype)}, kwargs=self._inputs(examples))
                    loss = self._loss(out.logits, examples)
                    total += float(loss.detach()) * len(examples.last)
                    if float(loss.detach()) >= self.stop_loss:
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        if self.norm_constraint is not None:
                            clamp_(weight, original.float(), self.norm_constraint)
                losses.append(total / len(requests))
                check_finite(losses[-1], self.name)
                if losses[-1] < self.stop_loss:
                    break
        if progress is not None:
            progress.advance(len(requests), f"loss {losses[-1]:.3g}")
        change = (weight.detach() - original.float()).to("cpu")
        details = {"layer": layer, "passes": len(losses), "losses": losses, "largest_change": float(change.abs().max())}
        return WeightEdit(self.name, model_fingerprint(model, whole=[name]), {name: Dense(change)}, requests, details)


@dataclass(kw_only=True)
class FTL(_FineTune):
    """FT-L: all of the target's tokens are made likely at the prompt's last token, whatever their order.

    That is the loss of the ROME paper's and of the benchmarks' FT, where the whole target is read off one distribution.
    The benchmarks leave the bound on the change off; the ROME paper has 5e-4 (GPT-2 XL, layer 0) or 5e-5.
    """

    name: ClassVar[str] = "ft-l"
    stronger: ClassVar[str] = "raise learning_rate or steps (an answer of several tokens is for ft-m)"

    def _inputs(self, examples: Examples) -> dict[str, Any]:
        # Only the prompts: what the target's tokens are does not matter to the position before them.
        width = int(examples.last.max()) + 1
        mask = examples.attention_mask.clone()
        mask[examples.is_target] = 0
        return {"input_ids": examples.input_ids[:, :width], "attention_mask": mask[:, :width], "use_cache": False}

    def _loss(self, logits: torch.Tensor, examples: Examples) -> torch.Tensor:
        return prompt_last_loss(logits, examples)


@dataclass(kw_only=True)
class FTM(_FineTune):
    """FT-M: the usual loss of fine-tuning, on the target's tokens only.

    The benchmarks bound the change for Mistral only (``norm_constraint`` 5e-5).
    """

    name: ClassVar[str] = "ft-m"
    stronger: ClassVar[str] = "raise learning_rate or steps (--set learning_rate=5e-3)"

    def _loss(self, logits: torch.Tensor, examples: Examples) -> torch.Tensor:
        return target_loss(logits, examples)


def prompt_last_loss(logits: torch.Tensor, examples: Examples) -> torch.Tensor:
    """Returns the mean over rows of −mean_i log p(o_i | prompt), every token o_i from the prompt's last position.

    Args:
        logits: (n, ≥ length of the longest prompt, vocabulary).
        examples: The prompts and targets.
    """
    rows = torch.arange(len(logits), device=logits.device)
    log_probabilities = logits[rows, examples.last].float().log_softmax(-1)
    means = [
        log_probabilities[row, torch.tensor(target, device=logits.device)].mean()
        for row, target in enumerate(examples.targets)
    ]
    return -torch.stack(means).mean()


@torch.no_grad()
def clamp_(weight: torch.Tensor, original: torch.Tensor, bound: float) -> None:
    """Brings each number of a tensor, in place, to within a bound of the original's."""
    weight.copy_(torch.clamp(weight, original - bound, original + bound))
