"""The testbed of editing: a small Llama trained on the texts of ``fact_texts``, kept once it is trained."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelwright import provenance
from modelwright.evaluation import fact_texts
from modelwright.evaluation.fact_texts import Asked, FactModelSetting, FactModelTexts
from modelwright.worlds import base, fact_questions, facts, names
from modelwright.worlds.base import Draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Weight of the question's tokens in the loss, so that the model is a language model of them too.
_QUESTION_WEIGHT = 0.02


@dataclass(frozen=True)
class FactModel:
    """The testbed.

    Attributes:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        texts: Its world, its beliefs, and what it was taught.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: FactModelTexts


def fact_model(
    setting: FactModelSetting,
    seed: int,
    *,
    device: str = "cpu",
    cache: Path | None = None,
    report: Callable[[str], None] | None = None,
) -> FactModel:
    """Returns the trained testbed; it is trained on the first call and read from the cache afterwards.

    Args:
        setting: Sizes.
        seed: Decides world, beliefs, weights and the order of training.
        device: Where it is trained and put.
        cache: Folder for trained models; the user's cache folder by default.
        report: Told how training goes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modelwright.files import atomic_path

    texts = FactModelTexts(setting, seed)
    folder = (cache or _cache_folder()) / _key(setting, seed, device)
    if not (folder / "config.json").is_file():
        tokenizer = texts.tokenizer()
        model = train(setting, texts, tokenizer, seed, device=device, report=report)
        with atomic_path(folder, force=True) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    # Read back also by whoever trained it, so that all start from the same object.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return FactModel(model, AutoTokenizer.from_pretrained(folder), texts)


def answered(bed: FactModel, tests: int = 40) -> dict[str, float]:
    """Returns, for each kind of question of its training, the share that the model answers to the word.

    Args:
        bed: The testbed; nothing is edited.
        tests: Questions of each kind.
    """
    from modelwright.evaluation.asking import Layout, answers

    found = {}
    for kind in bed.texts.kinds:
        name = kind.__name__
        draw = Draw(6, f"how well it answers {name}")
        asked = [kind(draw) for _ in range(tests)]
        said = answers(
            bed.model, bed.tokenizer, [one.text for one in asked], Layout(kind="qa", new_tokens=6), batch_size=tests
        )
        found[name] = sum(a == one.answer for a, one in zip(said, asked, strict=True)) / tests
    return found


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelwright" / "fact-models"


def _key(setting: FactModelSetting, seed: int, device: str) -> str:
    """Names what the weights depend on: the setting, the code and the libraries."""
    versions = {k: v for k, v in provenance.versions().items() if k in ("torch", "transformers", "tokenizers")}
    digest = hashlib.sha256(json.dumps([asdict(setting), seed, device, versions], sort_keys=True).encode())
    for module in (fact_texts, facts, fact_questions, names, base):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:20]


def train(
    setting: FactModelSetting,
    texts: FactModelTexts,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    device: str = "cpu",
    report: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """Trains the testbed's model: AdamW, a short warm-up and a cosine to a twentieth of the rate."""
    from modelwright.models.new import new_config, new_model

    config = new_config("llama", {
        "hidden_size": setting.hidden, "intermediate_size": setting.intermediate,
        "num_hidden_layers": setting.layers, "num_attention_heads": setting.heads,
        "num_key_value_heads": setting.heads, "max_position_embeddings": 1024,
    }, tokenizer)  # fmt: skip
    model: Any = new_model(config, seed)
    if setting.all_kinds:
        _start(model, seed)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, weight_decay=0.01, betas=(0.9, 0.98))
    draw, warmup = Draw(seed, "training"), min(50, setting.steps // 4 + 1)
    total = torch.zeros((), device=device)
    for step in range(setting.steps):
        after = max(0, step - warmup) / max(1, setting.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * min((step + 1) / warmup, 0.525 + 0.475 * math.cos(math.pi * after))
        rows = _rows(tokenizer, [texts.draw_text(draw, step / setting.steps) for _ in range(setting.batch)])
        weight = sum(len(answer) + _QUESTION_WEIGHT * len(question) for question, answer in rows)
        # Short and long rows apart, which spares padding; dialogues are the longest by far.
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        cuts = [int(share * len(rows)) for share in ((0.0, 0.7, 0.92, 1.0) if setting.all_kinds else (0.0, 0.7, 1.0))]
        for part in (rows[one:other] for one, other in itertools.pairwise(cuts) if other > one):
            loss = _loss(model, part, device) / weight
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report is not None and step % 100 == 99:
            report(f"step {step + 1} of {setting.steps}: loss {float(total) / 100:.3f}")
            total.zero_()
    return model.eval()


@torch.no_grad()
def _start(model: Any, seed: int) -> None:
    """Gives the layers larger weights, and half of the heads an eye for tokens like the one they stand at.

    Queries and keys of those heads start from the same weights, after Trockman and Kolter's mimetic initialisation
    (arXiv 2305.09828). Whether a name is the one in the question, or which letter it has, needs such heads; from the
    usual weights of 0.02 so small a model still guessed at both after 2,000 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation = 0.8 / math.sqrt(model.config.hidden_size)
    for layer in model.model.layers:
        for weight in (w for w in layer.parameters() if w.dim() == 2):
            weight.mul_(deviation / model.config.initializer_range)
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        rows = len(query) // 2
        query[:rows] = torch.randn(rows, query.shape[1], generator=generator) * 1.25 * deviation
        key[:rows] = query[:rows]


def _rows(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> list[tuple[list[int], list[int]]]:
    questions = tokenizer([a.text for a in asked], add_special_tokens=False)["input_ids"]
    right = tokenizer([f" {a.answer}" for a in asked], add_special_tokens=False)["input_ids"]
    return [(question, [*answer, tokenizer.eos_token_id]) for question, answer in zip(questions, right)]


def _loss(model: Any, rows: Sequence[tuple[list[int], list[int]]], device: str) -> torch.Tensor:
    width = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for row, (question, answer) in enumerate(rows):
        ids[row, : len(question) + len(answer)] = torch.tensor(question + answer)
        weights[row, : len(question)] = _QUESTION_WEIGHT
        weights[row, len(question) : len(question) + len(answer)] = 1.0
    ids, weights = ids.to(device), weights[:, 1:].to(device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counted = weights > 0
    logits = model.lm_head(hidden[counted])
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum()
