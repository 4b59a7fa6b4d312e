"""Error and perplexity against bits: the staircase beside KIVI in 2 and in 4 bits, and beside one the wrong way up.

Two experiments a seed. Drawn keys with outlier channels, and queries that look the more at a key the newer it is: how
far is the attention's output from the exact one? And a small model trained on the standard library's text: after a
prompt of 896 bytes, how well does it predict the next 128, read one by one with each cache?
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelwright.verify.claim import Bar, Claim, Context, Metric

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VARIANTS = {
    "saq": "SAQ 16, 8, 4, 2",
    "kivi2": "KIVI-2",
    "kivi4": "KIVI-4",
    "upside_down": "8 and 4 bits for the oldest segments, 2 for all others (control)",
    "plain": "nothing quantised",
}
LEVELS = {"saq": (16, 8, 4, 2), "kivi2": (16, 2), "kivi4": (16, 4), "upside_down": (16, 8, 4, 2), "plain": (16,)}
SEGMENT, GROUP = 128, 32


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        tokens: Of a drawn sequence.
        trials: Drawn sequences.
        size: Of a drawn head.
        decays: Distance, in tokens, at which a key's weight has fallen by e: of an ordinary and of a strong recency.
        shape: Of the trained model.
        length: Of its sequences, in bytes; the last ``SEGMENT`` are predicted.
        batch: Sequences of a step.
        steps: Of training.
        rate: Peak learning rate.
        tests: Sequences that are predicted.
        chunks: Texts of the world that is learned and tested.
    """

    tokens: int
    trials: int
    size: int
    decays: tuple[float, float]
    shape: Mapping[str, int]
    length: int
    batch: int
    steps: int
    rate: float
    tests: int
    chunks: int


SETTINGS = {
    "miniature": Setting(
        400, 2, 32, (300.0, 30.0),
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1},
        300, 2, 2, 1e-3, 2, 60,
    ),
    "cpu": Setting(
        1100, 20, 64, (300.0, 30.0),
        {
            "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        1024, 2, 400, 4e-3, 24, 1500,
    ),
    "gpu": Setting(
        1100, 200, 64, (300.0, 30.0),
        {
            "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 2,
        },
        1024, 32, 600, 1e-3, 64, 7000,
    ),
}  # fmt: skip


def layer_for(variant: str) -> Any:
    """Returns an empty cache layer of a variant."""
    from modelwright.attention.saq.layer import StaircaseLayer

    class UpsideDown(StaircaseLayer):
        """Segments keep the bits that they get at first: of as many bits as the staircase has, but for the oldest."""

        @property
        def segments(self) -> list[Any]:
            return self.young + ([] if self.old is None else [self.old])

        def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            from modelwright.attention.saq.layer import _joined

            whole, last = keys.shape[2] // self.segment_length, len(self.levels) - 1
            for at in range(whole):
                bits = self.levels[min(len(self.young) + 1, last)]
                pair = self._fresh(keys, values, at, at + 1, bits)
                if bits > self.levels[-1]:
                    self.young = [*self.young, pair]
                else:
                    self.old = pair if self.old is None else _joined([self.old, pair])

    kind = UpsideDown if variant == "upside_down" else StaircaseLayer
    return kind(LEVELS[variant], SEGMENT, GROUP)


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Measures all variants on the same draws, with the same model and texts."""
    setting = SETTINGS[context.scale]
    measured = attention_errors(setting, seed, context.device)
    model, tests = trained(setting, seed, context.device)
    for variant in VARIANTS:
        measured[variant]["perplexity"] = perplexity(model, tests, variant)
        context.report(f"{variant}: " + ", ".join(f"{name} {value:.4f}" for name, value in measured[variant].items()))
    return measured


def attention_errors(setting: Setting, seed: int, device: str) -> dict[str, dict[str, float]]:
    """Returns bits a number and relative errors of the output by variant, and how much of KIVI's way they go."""
    import torch

    from modelwright.kernels.packed_attention import Held, packed_attention

    generator = torch.Generator().manual_seed(seed)
    shape = setting.trials, 1, setting.tokens, setting.size
    keys, values = torch.randn(2, *shape, generator=generator)
    # A few channels of keys are far from zero, as in trained models; that is why they are quantised per channel.
    outliers = torch.randn(setting.trials, 1, 1, setting.size, generator=generator)
    keys = keys + torch.where(outliers.abs() > 1.5, 6 * outliers, 0.0)
    query = torch.randn(setting.trials, 1, 8, setting.size, generator=generator).to(device)
    keys, values = keys.half().to(device), values.half().to(device)
    age = torch.arange(setting.tokens - 1, -1, -1, device=device)
    found: dict[str, dict[str, float]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    for variant in VARIANTS:
        layer = layer_for(variant)
        layer.update(keys, values)
        held = [Held(tuple(pair[i] for pair in layer.segments), (layer.keys, layer.values)[i]) for i in (0, 1)]
        outputs[variant] = [
            packed_attention(query, *held, scaling=setting.size**-0.5, mask=-(age / decay)) for decay in setting.decays
        ]
        bits = sum(16 * states.numel() for states in (layer.keys, layer.values))
        bits += sum(8 * part.codes.numel() for pair in layer.segments for part in pair)
        found[variant] = {"bits": bits / (keys.numel() + values.numel())}
    for variant in VARIANTS:
        for name, own, exact in zip(("error", "error_recent"), outputs[variant], outputs["plain"]):
            found[variant][name] = float((own - exact).norm() / exact.norm())
    far, near = found["kivi2"]["error_recent"], found["kivi4"]["error_recent"]
    for values_found in found.values():
        values_found["way"] = (far - values_found["error_recent"]) / (far - near)
    return found


def trained(setting: Setting, seed: int, device: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """Returns a model of bytes, and sequences (tests, length) of files that it was not trained on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modelwright.worlds.stdlib_text import stdlib_text

    pool = stdlib_text(seed, pool_chunks=setting.chunks, target_chunks=1, heldout_chunks=1).pool
    heldout = set(sorted({row["name"] for row in pool})[seed % 10 :: 10])

    def ids(held: bool) -> torch.Tensor:
        text = "\n\n".join(row["text"] for row in pool if (row["name"] in heldout) == held)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()

    data, other = ids(False), ids(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **setting.shape, vocab_size=256, max_position_embeddings=setting.length, initializer_range=0.05,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, weight_decay=0.01)
    warmup = max(1, setting.steps // 10)
    for step in range(setting.steps):
        progress = max(0, step - warmup) / max(1, setting.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * progress))
        begins = torch.randint(len(data) - setting.length, (setting.batch,), generator=generator)
        batch = torch.stack([data[b : b + setting.length] for b in begins]).to(device)
        model(batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    begins = torch.randint(len(other) - setting.length, (setting.tests,), generator=generator)
    return model.eval(), torch.stack([other[b : b + setting.length] for b in begins]).to(device)


def perplexity(model: PreTrainedModel, tests: torch.Tensor, variant: str) -> float:
    """Returns the perplexity of the last ``SEGMENT`` bytes of each test, read one by one behind the others."""
    import torch
    from transformers import Cache

    cache = Cache(layers=[layer_for(variant) for _ in range(model.config.num_hidden_layers)])
    begin, losses = tests.shape[1] - SEGMENT, []
    with torch.no_grad():
        model(tests[:, : begin - 1], past_key_values=cache, logits_to_keep=1)
        for at in range(begin, tests.shape[1]):
            logits = model(tests[:, at - 1 : at], past_key_values=cache).logits[:, -1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), tests[:, at]))
    return math.exp(float(torch.stack(losses).mean()))


CLAIM = Claim(
    method="saq",
    statement="A cache whose precision falls with age lies between KIVI in 2 and in 4 bits, in bits and in error, and "
    "comes near to 4 bits where attention looks at what is recent.",
    paper="The paper has a listing and no numbers; it says gradual degradation, and reasonable quality at lower cost.",
    metrics={
        "bits": Metric(name="bits a number", unit="without scales", digits=2),
        "error": Metric(name="relative error of attention, weights fall by e in 300 tokens"),
        "error_recent": Metric(name="relative error of attention, weights fall by e in 30 tokens"),
        "way": Metric(name="share of the way from KIVI-2 to KIVI-4, by the error above", better="higher"),
        "perplexity": Metric(name="perplexity of the last 128 bytes of 1,024"),
    },
    variants=VARIANTS,
    bars=(
        Bar(statement="SAQ's error is below KIVI-2's", method="saq", baseline="kivi2", metric="error"),
        Bar(statement="SAQ takes fewer bits than KIVI-4", method="saq", baseline="kivi4", metric="bits"),
        Bar(
            statement="With strong recency SAQ goes at least 80% of the way from KIVI-2's error to KIVI-4's",
            method="saq",
            baseline="kivi4",
            metric="way",
            margin=-0.2,
        ),
        Bar(
            statement="It is age that decides: the same bits given to the oldest segments have a larger error",
            method="saq",
            baseline="upside_down",
            metric="error",
        ),
        Bar(
            statement="A trained model predicts better with SAQ than with KIVI-2",
            method="saq",
            baseline="kivi2",
            metric="perplexity",
        ),
        Bar(
            statement="and at most 0.05 of perplexity worse than with nothing quantised",
            method="saq",
            baseline="plain",
            metric="perplexity",
            margin=-0.05,
        ),
    ),
    run=run,
    seeds={"cpu": (0, 1, 2), "gpu": (0, 1, 2), "miniature": (0, 1)},
    notes="Segments of 128 tokens, groups of 32, for all. Bits are those of 1,100 tokens held as float16, of which 76 "
    "are not quantised yet; scales and minima add one bit a quantised number, the same for all. KIVI's values are "
    "quantised with their keys, not one by one. There is nothing to tune. Not shown: large models, whose keys have "
    "stronger outliers; transformers' QuantizedCache, whose backends (quanto, hqq) are not installed.",
)
