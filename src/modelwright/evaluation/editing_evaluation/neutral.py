"""What an edit should not change: the model on neutral text, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout, answers
from modelwright.evaluation.matching import repeated_share
from modelwright.models.scoring import context_length
from modelwright.models.tokenizers import encode, prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Numbers of the base model that are kept: tokens times vocabulary, in float16 (256 MiB).
_BUDGET = 1 << 27
_LONGEST = 256


class Neutral:
    """Neutral texts with the base model's distributions on them.

    Args:
        model: The model before any edit.
        tokenizer: Its tokenizer.
        texts: Texts; each is read up to 256 tokens, and as many as the memory of the base's distributions allows.
        starts: Texts of which a beginning is continued greedily, to see whether the model repeats itself.

    Attributes:
        base: What was measured of the base model.

    Raises:
        UserError: The texts hold no two tokens.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], starts: int = 4
    ) -> None:
        self.tokenizer = tokenizer
        self.base: dict[str, Any] = {}
        self._starts: list[str] = []
        self._rows: list[list[int]] = []
        if not texts:
            return
        longest = min(_LONGEST, context_length(model) or _LONGEST)
        rows = [[*prefix_ids(tokenizer), *row][:longest] for row in encode(tokenizer, list(texts))]
        vocabulary = model.get_input_embeddings().weight.shape[0]
        room = max(2, _BUDGET // vocabulary)
        for row in rows:
            if len(row) < 2 or room < 2:
                continue
            self._rows.append(row[:room])
            room -= len(self._rows[-1])
        if not self._rows:
            raise UserError("The neutral texts hold no two tokens: give ordinary text.")
        self._kept = [self._log_probabilities(model, row).half() for row in self._rows]
        self._starts = [" ".join(text.split()[:8]) for text in texts[:starts]]
        self.base = self.measure(model, lambda text: text)

    @torch.no_grad()
    def _log_probabilities(self, model: PreTrainedModel, row: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, :-1].float()
        self._largest = max(getattr(self, "_largest", 0.0), float(logits.abs().max()))
        return logits.log_softmax(-1).cpu()

    def measure(self, model: PreTrainedModel, prompt: Callable[[str], str]) -> dict[str, Any]:
        """Returns perplexity, KL(base || model) in nats a token, the largest |logit|, and the share of repeated words.

        Numbers that are not finite are None, as JSON has no name for them; without texts there is nothing to return.
        Edits that live in the prompt do not count here, only in the repeated share.
        """
        if not self._rows:
            return {}
        self._largest, nats, divergence, tokens = 0.0, 0.0, 0.0, 0
        for row, kept in zip(self._rows, self._kept, strict=True):
            now = self._log_probabilities(model, row)
            targets = torch.tensor(row[1:])
            nats -= float(now.gather(1, targets[:, None]).double().sum())
            base = kept.float()
            divergence += float((base.exp() * (base - now)).double().sum())
            tokens += len(targets)
        found: dict[str, Any] = {
            "perplexity": _finite(math.exp(nats / tokens) if math.isfinite(nats) and nats / tokens < 700 else math.inf),
            "kl": _finite(max(0.0, divergence / tokens)),
            "max_logit": _finite(self._largest),
        }
        if self._starts and found["max_logit"] is not None:
            layout = Layout(kind="raw", new_tokens=24)
            said = answers(model, self.tokenizer, [prompt(start) for start in self._starts], layout)
            found["repeated"] = repeated_share(said, n=2)
        return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
