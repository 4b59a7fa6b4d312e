"""ResFormer and SVFormer against Llama and the paper's baselines: validation loss at equal tokens, tuned rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelwright.verify.claim import Bar, Claim, Context, Metric

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: The seed that learning rates are chosen on; it is not among the claim's seeds.
TUNING_SEED = 1_000_003
#: 0.02 nats in bits. The paper gains 0.027 to 0.032 nats per token at every size; per byte this asks for more.
MARGIN = round(0.02 / math.log(2), 3)

VARIANTS = {
    "resformer": "ResFormer (½, ½)",
    "resformer_2_1": "ResFormer (2, 1)",
    "resformer_learnable": "ResFormer, learned coefficients",
    "svformer": "SVFormer",
    "llama": "Llama",
    "value_scale": "Llama, values × √5 (control for (2, 1))",
    "gqa": "Llama with GQA, half the key/value heads",
    "cla2": "CLA-2",
    "neutreno": "NeuTRENO (λ = 0.4)",
    "denseformer": "DenseFormer",
}


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        shape: Sizes of the models, as in ``LlamaConfig``. ``initializer_range`` is the paper's 0.02 at width 512,
            and grows with ``1 / sqrt(width)``, so that activations start as large as there.
        vocabulary: Size of the byte-level BPE, trained on the training text.
        length: Tokens in a sequence.
        batch: Sequences in a step.
        steps: Steps of training.
        rates: The learning rates that every variant is tried with, on the tuning seed.
        world: Parameters of the world ``stdlib_text``.
        validation: Sequences that the loss is measured on.
    """

    shape: Mapping[str, int | float]
    vocabulary: int
    length: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    world: Mapping[str, Any] = field(default_factory=dict)
    validation: int = 128


SETTINGS = {
    "miniature": Setting(
        shape={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        vocabulary=300,
        length=24,
        batch=2,
        steps=3,
        rates=(1e-3, 4e-3),
        world={"pool_chunks": 60, "target_chunks": 1, "heldout_chunks": 1},
        validation=4,
    ),
    "cpu": Setting(
        shape={
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "initializer_range": 0.057,
        },
        vocabulary=1024,
        length=64,
        batch=8,
        steps=300,
        rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
        world={"pool_chunks": 1500, "target_chunks": 1, "heldout_chunks": 1},
    ),
    # The paper's 82M model, less its vocabulary of 50,277.
    "gpu": Setting(
        shape={"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8},
        vocabulary=8192,
        length=512,
        batch=32,
        steps=150,
        rates=(3e-4, 6e-4, 1.2e-3, 2.4e-3),
        world={"pool_chunks": 7000, "target_chunks": 1, "heldout_chunks": 1, "docstring_share": 0.2},
        validation=256,
    ),
}


def prepare(context: Context) -> dict[str, Any]:
    """Chooses each variant's learning rate from the same grid, by validation loss on a seed of its own."""
    setting = SETTINGS[context.scale]
    data = _data(setting, TUNING_SEED)
    losses: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        losses[variant] = {}
        for rate in setting.rates:
            model = _trained(variant, setting, TUNING_SEED, rate, data.train, context.device)
            losses[variant][f"{rate:g}"] = _bits_per_byte(model, data, context.device)
            context.report(f"{variant} at {rate:g}: {losses[variant][f'{rate:g}']:.3f} bits per byte")
    chosen = {variant: float(min(found, key=lambda rate: found[rate])) for variant, found in losses.items()}
    return {"learning_rates": chosen, "validation_bits_per_byte": losses, "grid": list(setting.rates)}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Trains every variant on the same sequences in the same order, and measures it."""
    setting = SETTINGS[context.scale]
    data = _data(setting, seed)
    measured: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        rate = prepared["learning_rates"][variant]
        model = _trained(variant, setting, seed, rate, data.train, context.device)
        measured[variant] = {
            "bits_per_byte": _bits_per_byte(model, data, context.device),
            "entropy": _deep_entropy(model, data.validation, context.device),
            "cache_bytes": float(_cache_bytes(model, data.validation)),
            "parameters": float(sum(p.numel() for p in model.parameters())),
        }
        context.report(f"{variant}: {measured[variant]['bits_per_byte']:.3f} bits per byte")
    for values in measured.values():
        values["cache"] = values["cache_bytes"] / measured["llama"]["cache_bytes"]
    for values in measured.values():
        del values["cache_bytes"]
    return measured


def build(variant: str, setting: Setting, seed: int) -> PreTrainedModel:
    """Returns an untrained model of a variant."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modelwright.architectures.resformer import (
        ResFormerConfig,
        ResFormerForCausalLM,
        SVFormerConfig,
        SVFormerForCausalLM,
        ValueResidualConfig,
    )

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        **setting.shape, "vocab_size": setting.vocabulary, "max_position_embeddings": setting.length,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if variant == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    if variant == "gqa":
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=setting.shape["num_attention_heads"] // 2))
    if variant == "svformer":
        return SVFormerForCausalLM(SVFormerConfig(**sizes))
    none = ValueResidualConfig(mode="none")
    settings: dict[str, dict[str, Any]] = {
        "resformer": {},
        "resformer_2_1": {"value_residual": ValueResidualConfig(mode="constant", lambda_first=2.0, lambda_current=1.0)},
        "resformer_learnable": {"value_residual": ValueResidualConfig(mode="learnable")},
        "value_scale": {"value_residual": none, "value_scale": math.sqrt(5)},
        "cla2": {"value_residual": none, "cla_group_size": 2},
        "neutreno": {"value_residual": none, "neutreno_lambda": 0.4},
        "denseformer": {"value_residual": none, "denseformer": True},
    }
    return ResFormerForCausalLM(ResFormerConfig(**sizes, **settings[variant]))


@dataclass(frozen=True)
class Data:
    """Token ids, ``(n,)`` to train on and ``(sequences, length + 1)`` of other files to validate on."""

    train: torch.Tensor
    validation: torch.Tensor
    #: Bytes that a token stands for, ``(vocabulary,)``.
    widths: torch.Tensor


def _data(setting: Setting, seed: int) -> Data:
    import torch

    from modelwright.models.tokenizers import train_bpe
    from modelwright.worlds.stdlib_text import stdlib_text

    pool = stdlib_text(seed, **setting.world).pool
    # Every tenth file or topic: chunks of one file are too alike to be on both sides.
    heldout = set(sorted({row["name"] for row in pool})[seed % 10 :: 10])
    train = [row["text"] for row in pool if row["name"] not in heldout]
    tokenizer = train_bpe(train, setting.vocabulary)

    def ids(texts: list[str]) -> torch.Tensor:
        return torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])

    validation = ids([row["text"] for row in pool if row["name"] in heldout])
    length = setting.length + 1
    count = min(setting.validation, len(validation) // length)
    # In a byte-level BPE every character of a token stands for one byte.
    widths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(range(setting.vocabulary))])
    return Data(ids(train), validation[: count * length].view(count, length), widths)


def _trained(
    variant: str, setting: Setting, seed: int, rate: float, train: torch.Tensor, device: str
) -> PreTrainedModel:
    """Trains by the paper's recipe: AdamW (0.9, 0.95), decay 0.1, clipping at 1, cosine to a tenth."""
    import torch

    model = build(variant, setting, seed).to(device).train()
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.ndim > 1 and n not in spared], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if p.ndim <= 1 or n in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    # A fifth: with a twentieth, Llama was up to 0.3 bits per byte worse on the tuning seed at these few steps.
    warmup = max(1, setting.steps // 5)
    order = torch.Generator().manual_seed(seed)
    train = train.to(device)
    window = torch.arange(setting.length + 1, device=device)
    for step in range(setting.steps):
        progress = max(0, step - warmup) / max(1, setting.steps - warmup)
        scale = min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        starts = torch.randint(len(train) - setting.length, (setting.batch, 1), generator=order).to(device)
        sequences = train[starts + window]
        loss = _loss(model, sequences, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _loss(model: PreTrainedModel, sequences: torch.Tensor, device: str) -> torch.Tensor:
    """Mean cross-entropy of the tokens after the first, in nats."""
    import torch

    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=device != "cpu"):
        logits = model(sequences[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())


def _bits_per_byte(model: PreTrainedModel, data: Data, device: str) -> float:
    import torch

    with torch.no_grad():
        nats = sum(
            float(_loss(model, part.to(device), device)) * part[:, 1:].numel() for part in data.validation.split(32)
        )
    return nats / float(data.widths[data.validation[:, 1:]].sum()) / math.log(2)


def _deep_entropy(model: PreTrainedModel, validation: torch.Tensor, device: str) -> float:
    from modelwright.architectures.resformer.diagnostics import attention_concentration

    report = attention_concentration(model, validation[:16, :-1].to(device))
    last = report.entropy_by_layer[-2:]
    return sum(last) / len(last)


def _cache_bytes(model: PreTrainedModel, validation: torch.Tensor) -> int:
    import torch

    from modelwright.architectures.resformer import kv_cache_bytes

    with torch.no_grad():
        return kv_cache_bytes(model(validation[:1, :-1].to(model.device), use_cache=True).past_key_values)


CLAIM = Claim(
    method="resformer",
    statement="Adding the first layer's values to those of every later layer lowers the validation loss at equal "
    "tokens, more than the paper's alternatives and not for the values' scale; SVFormer needs about half the cache.",
    paper="v1: validation loss 0.027 to 0.032 nats per token below the Transformer (82M to 468M, 20B tokens); v5: "
    "16.11% fewer parameters and 20.3% less data at equal loss; SVFormer: 12.2% more parameters at equal loss, cache "
    "(N+1)/(2N).",
    metrics={
        "bits_per_byte": Metric(name="validation loss", unit="bits per byte"),
        "entropy": Metric(name="attention entropy, last two layers", unit="nats", better="higher"),
        "cache": Metric(name="key/value cache, Llama = 1"),
        "parameters": Metric(name="parameters", better=None, digits=0),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="ResFormer (½, ½) has a lower validation loss than Llama, by 0.02 nats per byte",
            method="resformer",
            baseline="llama",
            metric="bits_per_byte",
            margin=MARGIN,
        ),
        Bar(
            statement="(2, 1) is at least as good as (½, ½)",
            method="resformer_2_1",
            baseline="resformer",
            metric="bits_per_byte",
        ),
        Bar(
            statement="(2, 1) is better than only scaling the values alike, by 0.02 nats per byte",
            method="resformer_2_1",
            baseline="value_scale",
            metric="bits_per_byte",
            margin=MARGIN,
        ),
        Bar(
            statement="ResFormer (½, ½) is better than DenseFormer",
            method="resformer",
            baseline="denseformer",
            metric="bits_per_byte",
        ),
        Bar(
            statement="ResFormer (½, ½) is better than NeuTRENO",
            method="resformer",
            baseline="neutreno",
            metric="bits_per_byte",
        ),
        Bar(
            statement="ResFormer's attention is less concentrated than Llama's in the last two layers",
            method="resformer",
            baseline="llama",
            metric="entropy",
        ),
        Bar(
            statement="SVFormer's loss is at most 0.05 bits per byte above Llama's",
            method="svformer",
            baseline="llama",
            metric="bits_per_byte",
            margin=-0.05,
        ),
        Bar(
            statement="SVFormer's cache is at least a third smaller than Llama's (exactly (N - 1)/(2N))",
            method="svformer",
            baseline="llama",
            metric="cache",
            margin=round(1 / 3, 3),
        ),
    ),
    run=run,
    prepare=prepare,
    notes="All variants see the same tokens in the same order, each at its own best rate of one grid. Runs this short "
    "flatter every method that shares values: differences are larger than the paper's 1% of the loss, and SVFormer, "
    "which here may even beat Llama, is overtaken later (the paper: 12.2% more parameters for the same loss). Not "
    "shown: scaling laws, downstream tasks, long contexts, and where SVFormer and Llama cross. "
    "The initialisation (0.02 scaled to this width) was chosen on the tuning seed with the method's numbers in view: "
    "it is a tie for Llama but decides whether (2, 1) is as good as (½, ½); docs/log.md has both.",
)
