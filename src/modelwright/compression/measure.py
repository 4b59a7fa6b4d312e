"""What pruning costs and brings: parameters, memory, speed, perplexity and tasks, of models side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from modelwright.evaluation.perplexity import perplexity
from modelwright.models.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: How many times each model is timed; medians are reported.
ROUNDS = 5


def speeds(
    models: Mapping[str, PreTrainedModel],
    *,
    batch: int = 1,
    length: int = 512,
    new_tokens: int = 16,
    rounds: int = ROUNDS,
    decode_batch: int | None = None,
) -> dict[str, dict[str, float]]:
    """Times models turn by turn on the same random tokens, so that a busy machine slows all of them.

    Args:
        models: Name to model, all with one vocabulary.
        batch: Sequences at once.
        length: Tokens of each in the prefill; less if a model's context is shorter.
        new_tokens: Tokens generated after it, for the speed of decoding.
        rounds: Times that each is timed.
        decode_batch: Sequences at once in decoding, if other than ``batch``.

    Returns:
        For each model ``prefill_tokens_per_second``, ``decode_tokens_per_second`` (with the cache), ``prefill_times``
        and ``decode_times`` (its speed divided by the first model's, the median over turns), and, where the device
        counts it, ``peak_bytes`` of a prefill beyond what lay there before.
    """
    first = next(iter(models.values()))
    room = min(n for m in models.values() if (n := context_length(m) or 1 << 30))
    length = max(1, min(length, room - new_tokens - 1))
    vocabulary = first.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(first.device)
    few = ids[: decode_batch or batch, : max(1, min(length, 32))]
    taken: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for turn in range(rounds + 1):
        for name in list(models)[:: 1 if turn % 2 else -1]:
            model = models[name]
            if first.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            reading = _seconds(lambda model=model: prefill(model, ids), first.device)  # type: ignore[misc]
            if first.device.type == "cuda":
                found[name]["peak_bytes"] = float(torch.cuda.max_memory_allocated() - before)
            writing = _seconds(lambda model=model: decode(model, few, new_tokens), first.device)  # type: ignore[misc]
            if turn:  # the first is what sets everything up
                taken[name]["prefill"].append(reading)
                taken[name]["decode"].append(writing)
    for name, own in taken.items():
        found[name]["prefill_tokens_per_second"] = ids.numel() / statistics.median(own["prefill"])
        found[name]["decode_tokens_per_second"] = few.shape[0] * new_tokens / statistics.median(own["decode"])
        for kind, seconds in own.items():
            pairs = zip(next(iter(taken.values()))[kind], seconds, strict=True)
            found[name][f"{kind}_times"] = statistics.median(a / b for a, b in pairs)
    return found


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> None:
    """Reads (batch, length) tokens into a cache."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    """Writes tokens after (batch, length) ones, greedily, with the cache."""
    cache, token = None, ids
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters (tied ones once) and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Comparison:
    """Measures a dense model and smaller ones, one after the other.

    Attributes:
        dense: The model before pruning.
        tokenizer: Its tokenizer.
        texts: Documents for perplexity.
        tasks: Function that measures a model on tasks: task to metric to value; or None.
        batch: Sequences at once when timing.
        length: Tokens of each.
        rows: What was measured: the dense model first.
    """

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    tasks: Callable[[PreTrainedModel], dict[str, Any]] | None = None
    batch: int = 1
    length: int = 512
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows.append({"name": "dense", "ratio": 1.0, **self._quality(self.dense)})

    def add(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """Measures a model and returns its row; it is timed turn by turn with the dense one."""
        pruning = getattr(model.config, "pruning", None) or {}
        timed = speeds({"dense": self.dense, name: model}, batch=self.batch, length=self.length)
        if "prefill_tokens_per_second" not in self.rows[0]:
            self.rows[0].update(timed["dense"])
            self.rows[0]["block_parameters"] = pruning.get("block_parameters_before")
        row = {
            "name": name,
            "ratio": pruning.get("ratio"),
            "block_parameters": pruning.get("block_parameters"),
            **self._quality(model),
            **timed[name],
        }
        self.rows.append(row)
        return row

    def _quality(self, model: PreTrainedModel) -> dict[str, Any]:
        found: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": weight_bytes(model),
        }
        window = min(context_length(model) or 1 << 30, 2048)
        result = perplexity(model, self.tokenizer, self.texts, window=window, batch_size=4)["results"]["perplexity"]
        found["perplexity"] = _number(result["token_perplexity,none"])
        found["bits_per_byte"] = _number(result["bits_per_byte,none"])
        if self.tasks is not None:
            found["tasks"] = self.tasks(model)
        return found


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None
