"""Decoding by contrasting a model with itself without its retrieval heads: ``custom_generate=decore_generate(config)``.

Each step has two laws of the next token: the model's, and that of a twin whose chosen heads are off. The scores are
``(1 + a) log p - a log p_twin`` (equation 5 of arXiv 2410.18860), with ``a`` a constant or the entropy of the model's
law. Both are rows of one batch behind one prompt cache, so that weights are read once a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from modelwright.decoding.contrast import (
    as_float,
    check_alpha,
    check_relative_top,
    check_vocabularies,
    contrast,
    entropy,
    fill_up,
    keep_plausible,
)
from modelwright.decoding.decore.ablation import ABLATIONS, Ablation, HeadAblation
from modelwright.decoding.loop import Decoding, Prompt, Stream, all_logits
from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

From = Literal["last", "all"]


@dataclass
class DeCoReConfig:
    """What the twin lacks, and how far to go away from it.

    Attributes:
        heads: Pairs of layer and query head that the twin lacks: ``scores.top(20)``. Of the amateur, if there is one.
        alpha: Strength: a number (DeCoRe static; the paper's default is 0.5), ``entropy`` of the model's law in nats
            (DeCoRe entropy), or ``entropy-gain``, the entropy of the twin's law minus that of the model's, which may
            be negative (in the official code, not in the paper).
        ablation: What switching off means: see :class:`~modelwright.decoding.decore.HeadAblation`. The paper's is
            ``zero``; the official code's, for comparison with published numbers, ``uniform``.
        mask_from: Which tokens the heads are off for in generation: from the ``last`` token of the prompt on (the
            official code), or ``all``.
        score_from: The same for log-probabilities of given text; the official code takes ``all``.
        alpha_cap: Greatest strength; None for no bound. (The official code takes a bound of 0 for none; here it is 0.)
        scale_alpha: Divide entropies by ln V, so that they lie between 0 and 1.
        relative_top: Only tokens that have at least this fraction of the most probable one's probability are kept;
            None keeps all, as the paper does. Wise for sampling: 0.1.
        amateur: A smaller model with the same tokens, which takes the twin's part (DeCoRe entropy-lite).
        pad_vocabulary: Whether the amateur's table of tokens may have another size, for models of one tokenizer whose
            tables were padded differently (Qwen2.5): tokens that only one has are ruled out.
        means: For the ablation ``mean``: see :func:`~modelwright.decoding.decore.mean_outputs`.
        batch: Whether model and twin are rows of one batch, or read one after the other, which needs less memory at
            once and more time.
        like: See :func:`~modelwright.models.heads.head_layers`.
        output: See there.
    """

    heads: Sequence[Sequence[int]]
    _: KW_ONLY
    alpha: float | Literal["entropy", "entropy-gain"] = "entropy"
    ablation: Ablation = "zero"
    mask_from: From = "last"
    score_from: From = "all"
    alpha_cap: float | None = None
    scale_alpha: bool = False
    relative_top: float | None = None
    amateur: PreTrainedModel | None = field(default=None, repr=False)
    pad_vocabulary: bool = False
    means: Tensor | None = field(default=None, repr=False)
    batch: bool = True
    like: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            UserError: One is.
        """
        if isinstance(self.alpha, str):
            if self.alpha not in ("entropy", "entropy-gain"):
                raise UserError(f"alpha is '{self.alpha}': give a number, entropy or entropy-gain.")
        else:
            check_alpha(self.alpha)
        if self.alpha_cap is not None:
            check_alpha(self.alpha_cap)
        check_relative_top(self.relative_top)
        for name in ("mask_from", "score_from"):
            if getattr(self, name) not in ("last", "all"):
                raise UserError(f"{name} is '{getattr(self, name)}': it is last or all.")
        if self.ablation not in ABLATIONS:
            raise UserError(f"There is no ablation '{self.ablation}': it is {', '.join(ABLATIONS)}.")

    def strength(self, base: Tensor, twin: Tensor) -> float | Tensor:
        """Returns alpha for logits ``(…, V)`` of both: a number, or ``(…)``."""
        if isinstance(self.alpha, str):
            found = entropy(base)
            if self.alpha == "entropy-gain":
                found = entropy(twin) - found
            if self.scale_alpha:
                found = found / math.log(base.shape[-1])
            return found if self.alpha_cap is None else found.clamp(max=self.alpha_cap)
        return self.alpha if self.alpha_cap is None else min(self.alpha, self.alpha_cap)

    @property
    def idle(self) -> bool:
        """Whether the twin cannot change a score: it lacks nothing, or the strength is 0."""
        if self.amateur is None and not len(self.heads):
            return True
        return self.alpha == 0 or (self.alpha_cap == 0 and self.alpha != "entropy-gain")

    def combine(self, base: Tensor, twin: Tensor) -> Tensor:
        """Returns the scores of the next token, ``(…, V)``, of logits of both in float32 or float64."""
        size = base.shape[-1]
        strength = self.strength(base, twin)
        base, twin = base[..., : twin.shape[-1]], twin[..., :size]
        return fill_up(keep_plausible(contrast(base, twin, strength), base, self.relative_top), size)

    def ablate(self, model: PreTrainedModel) -> HeadAblation:
        """Returns the twin: the heads of this config off in a model.

        Raises:
            UserError: The model has not these heads.
        """
        return HeadAblation(model, self.heads, self.ablation, means=self.means, like=self.like, output=self.output)

    @torch.no_grad()
    def score(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor | Sequence[int],
        continuation_ids: Tensor | Sequence[int],
    ) -> Tensor:
        """Returns the log-probability of each token of a continuation under the contrasted law.

        Args:
            model: The model.
            prompt_ids: Tokens ``(n,)``, at least one.
            continuation_ids: Tokens ``(m,)``.

        Returns:
            ``(m,)`` float32 natural logarithms, normalised over the vocabulary.

        Raises:
            UserError: There is no prompt.
        """
        first, second = (torch.as_tensor(ids, dtype=torch.long).reshape(-1) for ids in (prompt_ids, continuation_ids))
        if not len(first):
            raise UserError("A continuation can only be scored behind at least one token: put the begin token there.")
        whole = torch.cat((first, second))[None, :].to(model.device)
        found = DeCoRe(self).next_token_log_probs(model, whole[:, :-1], prompt_lengths=[len(first)])
        found = found[0, len(first) - 1 :]
        return found.gather(-1, whole[0, len(first) :, None])[:, 0]


class DeCoRe(Decoding):
    """The decoding of a :class:`DeCoReConfig`, for ``generate(custom_generate=…)``.

    Args:
        config: Heads and strengths.
        streamer: See :class:`~modelwright.decoding.loop.Decoding`.
    """

    def __init__(self, config: DeCoReConfig, *, streamer: BaseStreamer | None = None) -> None:
        super().__init__(streamer=streamer)
        self.config = config

    def check(self, model: PreTrainedModel) -> None:
        """Refuses heads that the model has not, an ablation that it cannot have, and an amateur with other tokens.

        Raises:
            UserError: See above.
        """
        config = self.config
        owner = config.amateur if config.amateur is not None else model
        config.ablate(owner)  # which refuses heads, and an ablation that the model cannot have
        if config.amateur is not None:
            check_vocabularies(_vocabulary(config.amateur), _vocabulary(model), config.pad_vocabulary)

    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        if self.config.idle:
            return self._alone(model, prompt)
        if self.config.mask_from == "all" and prompt.known and self.config.amateur is None:
            raise UserError("A cache given holds tokens read with the heads: leave it out, or use mask_from='last'.")
        if self.config.batch and self.config.amateur is None:
            return self._rows(model, prompt)
        return self._streams(model, prompt)

    def _alone(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """The model without a twin: on a GPU a second row would round otherwise, and ties fall to other tokens."""
        stream, ids = Stream(model, prompt), prompt.ids[:, prompt.known :]
        while True:
            base = stream.logits(ids)
            tokens = yield keep_plausible(base, base, self.config.relative_top)
            ids = tokens[:, None]

    def _rows(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """Each sequence is two rows side by side: the model's, and the twin's."""
        rows = len(prompt.ids)
        stream = Stream(model, prompt)
        with self.config.ablate(model) as twin:
            begin = self._prefill(stream, twin, prompt)
            stream.repeat(2)
            off = torch.tensor([False, True], device=prompt.ids.device).repeat(rows)[:, None]
            twin.where = off
            ids = prompt.ids[:, begin:].repeat_interleave(2, 0)
            try:
                while True:
                    self._since(twin, stream, prompt, ids, off)
                    both = stream.logits(ids)
                    tokens = yield self.config.combine(both[::2], both[1::2])
                    ids = tokens.repeat_interleave(2)[:, None]
            finally:
                if prompt.cache is not None:  # the caller's: it gets the model's own rows
                    prompt.cache.batch_select_indices(torch.arange(0, 2 * rows, 2))

    def _streams(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """The model and the twin, or an amateur, read one after the other, each with a cache of its own."""
        owner = model if self.config.amateur is None else self.config.amateur
        stream = Stream(model, prompt)
        with self.config.ablate(owner) as twin:
            begin = self._prefill(stream, twin, prompt)
            if owner is model and begin > prompt.known:
                other, other_begin = copy.copy(stream), begin
                other.cache = copy.deepcopy(stream.cache)
            else:
                own = prompt.beside(owner)
                other = Stream(owner, own)
                other_begin = self._prefill(other, twin, own)
            ids, other_ids = prompt.ids[:, begin:], prompt.ids[:, other_begin:].to(owner.device)
            while True:
                twin.enabled = False
                base = stream.logits(ids)
                twin.enabled = True
                self._since(twin, other, prompt, other_ids)
                found = other.logits(other_ids).to(base.device)
                tokens = yield self.config.combine(base, found)
                ids = tokens[:, None]
                other_ids = ids.to(owner.device)

    def _prefill(self, stream: Stream, twin: HeadAblation, prompt: Prompt) -> int:
        """Reads what the twin has in common with the model; returns the first token that was not read."""
        last = prompt.ids.shape[1] - 1
        if self.config.mask_from == "all" or prompt.cache is None:
            return prompt.known
        if prompt.known < last:
            was, twin.enabled = twin.enabled, False
            stream.read(prompt.ids[:, prompt.known : -1].to(stream.model.device))
            twin.enabled = was
        return last

    def _since(
        self, twin: HeadAblation, stream: Stream, prompt: Prompt, ids: Tensor, off: Tensor | None = None
    ) -> None:
        """Without a cache all is read anew each time, the prompt too, in which the twin has its heads."""
        if prompt.cache is None and self.config.mask_from == "last":
            columns = torch.arange(stream.seen + ids.shape[1], device=ids.device)[None]
            since = columns >= prompt.ids.shape[1] - 1
            twin.where = since if off is None else off & since

    @torch.no_grad()
    def next_token_log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """See :class:`~modelwright.decoding.loop.Decoding`.

        Args:
            model: The model.
            input_ids: Tokens ``(rows, length)``.
            attention_mask: ``(rows, length)``, 0 for padding.
            prompt_lengths: Tokens of each row that are prompt; needed with ``score_from="last"`` only.

        Raises:
            UserError: They are needed and not given.
        """
        self.check(model)
        config = self.config
        owner = model if config.amateur is None else config.amateur
        base = as_float(all_logits(model, input_ids, attention_mask).logits)
        with config.ablate(owner) as twin:
            if config.score_from == "last":
                if prompt_lengths is None:
                    raise UserError("score_from='last' needs the prompts' lengths: give them, or take 'all'.")
                real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                lengths = torch.as_tensor(prompt_lengths, device=input_ids.device)[:, None]
                twin.where = real.cumsum(1) >= lengths
            mask = None if attention_mask is None else attention_mask.to(owner.device)
            other = as_float(all_logits(owner, input_ids.to(owner.device), mask).logits)
        return config.combine(base, other.to(base.device)).log_softmax(-1)


def decore_generate(config: DeCoReConfig, *, streamer: BaseStreamer | None = None) -> DeCoRe:
    """Returns what ``model.generate(custom_generate=…)`` takes, for :class:`DeCoReConfig`.

    Args:
        config: Heads and strengths.
        streamer: Gets prompts and tokens; ``generate`` keeps its own ``streamer`` to itself.
    """
    return DeCoRe(config, streamer=streamer)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
