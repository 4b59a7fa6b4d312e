"""A model of lm-eval whose every score and text goes through decoding methods. Needs the extra ``lm-eval``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import StoppingCriteria, StoppingCriteriaList

from modelwright.decoding.parts import Parts, read_parts
from modelwright.editing.edit import edits_on
from modelwright.editing.examples import answer_logits
from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopInCompletion(StoppingCriteria):
    """Ends a row once a stop text stands in what was generated; keeps no state, so rows may leave the batch.

    Args:
        tokenizer: The tokenizer.
        stops: The texts.
        start: Tokens of the (padded) prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str], start: int) -> None:
        self.tokenizer, self.start = tokenizer, start
        # Two more tokens, because a text may be cut into others than alone; as lm-eval has it.
        self.stops = [(stop, len(tokenizer.encode(stop, add_special_tokens=False)) + 2) for stop in stops if stop]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Returns (rows,) bool."""
        done = [self._ended(row) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(done, device=input_ids.device)

    def _ended(self, row: list[int]) -> bool:
        return any(stop in self.tokenizer.decode(row[-lookback:]) for stop, lookback in self.stops)


@register_model("modelwright")
class MethodLM(HFLM):
    """lm-eval's own model of transformers, with decoding methods applied.

    Without a method, it is :class:`HFLM` and nothing else. Log-likelihoods come from the law that the methods choose
    tokens by (see :class:`~modelwright.decoding.parts.Decoder`).

    From lm-eval's command line, after ``import modelwright.evaluation.harness_model``:
    ``--model modelwright --model_args pretrained=org/model,methods=decore.yaml``.

    Args:
        pretrained: A loaded model, a folder or a hub id.
        methods: Methods; or names and files with ``+`` between them.
        **options: Those of HFLM.

    Raises:
        UserError: A method does not exist, does not go with the model, or needs what a task does not say.
    """

    def __init__(self, pretrained: Any, methods: Parts | str = "", **options: Any) -> None:
        super().__init__(pretrained=pretrained, **options)
        if isinstance(methods, str):
            methods = read_parts([part.strip() for part in methods.split("+") if part.strip()])
        self._methods = contextlib.ExitStack()
        self.applied = self._methods.enter_context(methods.on(self.model, self.tokenizer))
        if self.applied.needs_context:
            self.close()
            raise UserError(
                f"'{methods.name}' needs each prompt without its context too, which tasks of lm-eval do not say: use "
                f"modelwright generate, or modelwright evaluate nq-swap."
            )

        if getattr(self.applied.decoder, "looks_ahead", False):
            # lm-eval pads on the right without a mask: such a law must see each text alone.
            self.batch_size_per_gpu = 1

    def close(self) -> None:
        """Takes the methods off the model."""
        self._methods.close()

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        decoder = self.applied.decoder
        if decoder is None or decoder.exact:
            return super()._model_call(inps, attn_mask, labels)
        # Padding stands on the right, where no token before it sees it.
        with torch.no_grad():
            return self.applied.log_probs(inps, torch.ones_like(inps))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        decoder = self.applied.decoder
        if not (decoder is None or decoder.exact) or not any(edit.reads_rows for edit in edits_on(self.model)):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pairs = []  # with the prompts in a call of their own: the answers are not to be read
        for _, context, answer in requests:
            pairs.append(([*context, *answer][-(self.max_length + 1) : -len(answer)], answer))
        size = override_bs or self.batch_size
        found: list[Any] = [None] * len(pairs)
        for i, logits in answer_logits(self.model, pairs, size if isinstance(size, int) else 1):
            log_p, answer = logits.log_softmax(-1), list(pairs[i][1])
            chosen = log_p.gather(1, torch.tensor(answer, device=log_p.device)[:, None])
            found[i] = (float(chosen.sum()), log_p.argmax(-1).tolist() == answer)
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        if self.applied.decoder is None:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        temperature = generation_kwargs.pop("temperature", 0.0)
        sampling = generation_kwargs.pop("do_sample", None)
        if sampling is None:
            sampling = temperature > 0
        if sampling:
            generation_kwargs["temperature"] = temperature or 1.0
        return self.applied.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([StopInCompletion(self.tokenizer, stop, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            do_sample=sampling,
            **generation_kwargs,
        )
