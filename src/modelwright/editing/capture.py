"""What modules get and give at the token where a fact is looked up, for many prompts at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from modelwright.editing.hooks import Stop, first, with_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Input of a module (batch, length, in), its output (batch, length, out) and the rows of the batch -> another output.
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """Where to look: what a module gets, or what it gives.

    Attributes:
        module: Such as a down projection or a block.
        side: Its (first) input or its (first) output.
    """

    module: nn.Module
    side: Literal["input", "output"]


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sites: Sequence[Site],
    *,
    last_block: nn.Module,
    changes: dict[nn.Module, Change] | None = None,
    batch_tokens: int = 8192,
) -> list[torch.Tensor]:
    """Returns what the sites hold at the last token of each row.

    A causal model's token sees nothing behind it, so rows end at the token in question.

    Args:
        model: A causal language model.
        rows: Tokens, each row up to its token.
        sites: Where to look.
        last_block: The forward pass ends after this one.
        changes: Modules whose output is to be changed on the way.
        batch_tokens: Tokens at once, padding included.

    Returns:
        For each site (rows, width), in the model's dtype, on its device.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[list[torch.Tensor]] = [[] for _ in sites]
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(rows[order[end]]) * (end + 1 - start) <= batch_tokens:
            end += 1
        picked = order[start:end]
        start = end
        width = len(rows[picked[-1]])
        ids = torch.zeros(len(picked), width, dtype=torch.long)
        mask = torch.zeros(len(picked), width, dtype=torch.long)
        for number, i in enumerate(picked):
            ids[number, : len(rows[i])] = torch.tensor(rows[i])
            mask[number, : len(rows[i])] = 1
        device = model.device
        numbers = torch.arange(len(picked), device=device)
        at = mask.sum(1).to(device) - 1
        hooks: list[tuple[nn.Module, Callable[..., object]]] = []
        for module, change in (changes or {}).items():
            hooks.append((module, _changing(change, torch.tensor(picked, device=device))))
        for site, values in zip(sites, found):
            hooks.append((site.module, _looking(site.side, values, numbers, at)))
        hooks.append((last_block, _stop))  # hooks of one module run in this order
        with contextlib.ExitStack() as stack:
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
            stack.enter_context(contextlib.suppress(Stop))
            kwargs = {} if bool(mask.all()) else {"attention_mask": mask.to(device)}
            model(input_ids=ids.to(device), use_cache=False, **kwargs)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return [torch.cat(values)[back.to(values[0].device)] for values in found]


def _changing(change: Change, rows: torch.Tensor) -> Callable[..., object]:
    return lambda _, inputs, output: with_first(output, change(inputs[0], first(output), rows))


def _looking(side: str, values: list[torch.Tensor], rows: torch.Tensor, at: torch.Tensor) -> Callable[..., object]:
    def look(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        values.append((inputs[0] if side == "input" else first(output))[rows, at].clone())

    return look


def _stop(module: nn.Module, inputs: object, output: object) -> None:
    raise Stop
