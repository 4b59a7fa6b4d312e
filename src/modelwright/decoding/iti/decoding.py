"""Inference-time intervention (ITI): heads' outputs are shifted by ``a sigma theta`` while the answer is written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from modelwright.decoding.contrast import as_float
from modelwright.decoding.iti.directions import HeadDirections
from modelwright.decoding.loop import Decoding, Prompt, Stream, all_logits
from modelwright.errors import UserError
from modelwright.models.heads import check_heads, head_layers
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class InterventionDecoding(Decoding):
    """Shifts heads from the last token of the prompt on.

    Args:
        directions: Of the heads to shift: ``fit_directions(...).top(48)``; 48 is the paper's for 7B models.
        alpha: Deviations by which they are shifted; 15 is the paper's for 7B models. May be negative.
        streamer: See :class:`~modelwright.decoding.loop.Decoding`.
    """

    def __init__(
        self, directions: HeadDirections, alpha: float = 15.0, *, streamer: BaseStreamer | None = None
    ) -> None:
        super().__init__(streamer=streamer)
        if not math.isfinite(alpha):
            raise UserError(f"alpha is {alpha}: give a number.")
        self.directions, self.alpha = directions, float(alpha)

    def check(self, model: PreTrainedModel) -> None:
        """Refuses directions of heads that the model has not.

        Raises:
            UserError: It has not.
        """
        check_heads(self.directions.heads, head_layers(model))

    @contextlib.contextmanager
    def shifted(self, model: PreTrainedModel, where: list[Tensor | None]) -> Iterator[None]:
        """Shifts the heads inside the block.

        Args:
            model: The model.
            where: Its one entry, read at each call, says for which tokens: ``(rows, tokens)`` bool, None for all.
        """
        layers = head_layers(model)
        shifts: dict[int, Tensor] = {}
        for head, direction, deviation in zip(
            check_heads(self.directions.heads, layers), self.directions.directions, self.directions.deviations,
            strict=True,
        ):  # fmt: skip
            layer = layers[head[0]]
            whole = shifts.setdefault(head[0], torch.zeros(layer.heads * layer.size))
            whole[layer.columns(head[1])] = self.alpha * deviation * direction

        def hook(shift: Tensor) -> Any:
            kept = {"": shift}

            def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                x = args[0]
                own = kept[""] = kept[""].to(x)
                at = where[0]
                return (x + (own if at is None else own * at.to(x.device)[..., None]), *args[1:])

            return add

        handles = [layers[index].output.register_forward_pre_hook(hook(shift)) for index, shift in shifts.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        stream, last = Stream(model, prompt), prompt.ids.shape[1] - 1
        begin = prompt.known
        if prompt.cache is not None and begin < last:
            stream.read(prompt.ids[:, begin:-1])
            begin = last
        ids = prompt.ids[:, begin:]
        places: list[Tensor | None] = [None]
        with self.shifted(model, places):
            while True:
                if prompt.cache is None:  # all is read anew
                    places[0] = torch.arange(stream.seen + ids.shape[1], device=ids.device)[None] >= last
                tokens = yield stream.logits(ids)
                ids = tokens[:, None]

    @torch.no_grad()
    def next_token_log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: list[int] | None = None,
    ) -> Tensor:
        """See :class:`~modelwright.decoding.loop.Decoding`.

        Args:
            model: The model.
            input_ids: Tokens ``(rows, length)``.
            attention_mask: Their mask.
            prompt_lengths: Tokens of each row that are prompt: heads are shifted from the last of them on; by default
                for all tokens.
        """
        self.check(model)
        where: list[Tensor | None] = [None]
        if prompt_lengths is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            where[0] = mask.cumsum(1) >= torch.as_tensor(prompt_lengths, device=mask.device)[:, None]
        with self.shifted(model, where):
            return as_float(all_logits(model, input_ids, attention_mask).logits).log_softmax(-1)


@dataclass(kw_only=True)
class InterventionOptions:
    """Shifts the heads that tell true from false, along the direction from false to true."""

    directions: Annotated[Path, Arg("Directions, as HeadDirections.save writes them.", kind="input")]
    top: Annotated[int, Arg("How many of the best heads are shifted.")] = 48
    alpha: Annotated[float, Arg("Deviations by which they are shifted.")] = 15.0

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> InterventionDecoding:
        """Returns what ``generate(custom_generate=…)`` takes.

        Raises:
            UserError: The file cannot be read, or is another model's.
        """
        return InterventionDecoding(HeadDirections.load(self.directions, model).top(self.top), self.alpha)
