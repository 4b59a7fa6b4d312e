"""Does MIGU forget less than its rivals when all learning rates are tuned, and do its rows do what the paper says?

A small model first learns some tasks of a generated stream together, as pre-training, and then others one after the
other. The prototype in our notes did not find the paper's gain at this size; the bars ask for it all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelwright.models.new import new_config, new_model
from modelwright.training.continual import ContinualBenchmark, ContinualOptions, Example, Task, world_tasks
from modelwright.training.continual.examples import Encoder, answer_loss
from modelwright.training.continual.similarity import task_overlap
from modelwright.training.migu.config import MIGUConfig
from modelwright.training.migu.mask import MIGUMask
from modelwright.verify.claim import Bar, Claim, Context, Measurements, Metric
from modelwright.worlds.task_stream import task_stream

TUNING_SEED = 1000
THRESHOLD = 0.7
MASKS = {
    "migu": MIGUConfig(threshold=THRESHOLD),
    "random": MIGUConfig(threshold=THRESHOLD, select="random"),
    "low": MIGUConfig(threshold=THRESHOLD, select="low-magnitude"),
}
#: What each variant searches, the same number of runs for each: a learning rate, or for EWC its weight.
RATES = (7e-4, 1.4e-3, 2.8e-3, 5.6e-3)
EWC_WEIGHTS = (10.0, 100.0, 1000.0, 10_000.0)
TUNED = ("ft", "migu", "random", "low", "replay", "ewc")


@dataclass(frozen=True)
class Setting:
    """Sizes of a scale: tasks learnt before and in the stream, rows, the model, steps."""

    tasks: int
    train_rows: int
    test_rows: int
    hidden: int
    layers: int
    pretraining_steps: int
    steps: int
    batch_size: int
    harm_steps: int


SETTINGS = {
    "miniature": Setting(2, 24, 8, 16, 1, 4, 2, 4, 2),
    "cpu": Setting(3, 400, 80, 64, 2, 260, 80, 32, 20),
    "gpu": Setting(4, 2000, 200, 512, 4, 600, 100, 64, 20),
}


@dataclass
class Start:
    """A pre-trained model, what it knows, and what comes next."""

    model: Any
    tokenizer: Any
    old: list[Task]
    new: list[Task]


def _tokenizer(tasks: Sequence[Task]) -> Any:
    """A token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = (f"{row.prompt} {row.answer}" for task in tasks for row in (*task.train, *task.test))
    words = sorted({word for text in texts for word in text.split()})
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name.strip('<>')}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _options(setting: Setting, device: str, **keys: Any) -> ContinualOptions:
    return ContinualOptions(batch_size=setting.batch_size, device=device, **keys)


def prepare_model(context: Context, seed: int) -> Start:
    """Makes the stream of a seed and trains a model on its first half, all tasks together."""
    setting = SETTINGS[context.scale]
    world = task_stream(
        seed, tasks=2 * setting.tasks, classes=4, train_rows=setting.train_rows, test_rows=setting.test_rows
    )
    tasks = world_tasks(world)
    old, new = tasks[: setting.tasks], tasks[setting.tasks :]
    tokenizer = _tokenizer(tasks)
    sizes = {
        "hidden_size": setting.hidden, "intermediate_size": 2 * setting.hidden, "num_hidden_layers": setting.layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    model = new_model(new_config("llama", sizes, tokenizer), seed)
    together = Task("all", [row for task in old for row in task.train], [row for task in old for row in task.test[:8]])
    options = _options(
        setting, context.device, steps=setting.pretraining_steps, seed=seed, weight_decay=0.0,
        learning_rate=3e-3 if setting.hidden < 256 else 6e-4,
    )  # fmt: skip
    result = ContinualBenchmark([together]).run(model, tokenizer, options)
    context.report(f"seed {seed}: the first tasks are answered with accuracy {result.matrix.final():.2f}")
    return Start(result.model, tokenizer, old, new)


def _copy(model: Any) -> Any:
    return copy.deepcopy(model)


def stream(
    context: Context, start: Start, variant: str, choice: float, seed: int, rate: float = 0.0
) -> dict[str, float]:
    """Trains a copy of the model on the new tasks and returns ACC, forgetting and learning accuracy.

    Args:
        context: Of the claim.
        start: See :func:`prepare_model`.
        variant: One of :data:`TUNED`.
        choice: What was searched: the learning rate, or EWC's weight.
        seed: Of the order of the data.
        rate: EWC's learning rate, which is fine-tuning's.
    """
    setting = SETTINGS[context.scale]
    own: dict[str, Any] = {"ewc": choice, "ewc_samples": 64} if variant == "ewc" else {}
    if variant == "replay":
        own["replay"] = 0.02
    options = _options(
        setting, context.device, steps=setting.steps, seed=seed,
        learning_rate=rate if variant == "ewc" else choice, **own,
    )  # fmt: skip
    model = _copy(start.model)
    result = ContinualBenchmark(start.new).run(model, start.tokenizer, options, mask=copy.copy(MASKS.get(variant)))
    return {
        "accuracy": result.matrix.final(),
        "forgetting": result.matrix.forgetting(),
        "learning": result.matrix.learning(),
    }


def prepare(context: Context) -> Mapping[str, Any]:
    """Searches each variant's learning rate, or EWC's weight, by final accuracy on a seed of its own."""
    start = prepare_model(context, TUNING_SEED)
    found: dict[str, Any] = {"chosen": {}, "tried": {}}
    for variant in TUNED:
        rate = found["chosen"].get("ft", 0.0)
        tried = {
            str(choice): stream(context, start, variant, choice, TUNING_SEED, rate)["accuracy"]
            for choice in (EWC_WEIGHTS if variant == "ewc" else RATES)
        }
        found["tried"][variant] = tried
        found["chosen"][variant] = float(max(tried, key=lambda choice: tried[choice]))
        context.report(f"{variant}: {tried}")
    return found


def overlap(start: Start) -> dict[str, float]:
    """Returns the share of rows that are loud for two halves of one task, and for two tasks.

    Of the layers into the last block's feed-forward part, where the paper looks.
    """
    layers = task_overlap(start.model, Encoder(start.tokenizer, 60), start.old)["layers"]
    last = max(int(name.split(".")[2]) for name in layers)
    chosen = [m for n, m in layers.items() if n.startswith(f"model.layers.{last}.mlp") and "down" not in n]
    count = len(start.old)
    same = [matrix[i][i] for matrix in chosen for i in range(count)]
    other = [matrix[i][j] for matrix in chosen for i in range(count) for j in range(count) if i != j]
    return {"same": sum(same) / len(same), "other": sum(other) / len(other)}


def harm(context: Context, start: Start, variant: str) -> dict[str, float]:
    """Relabels one known task, trains on it by steps of equal length, and looks at the other known tasks.

    Each step changes the blocks' weights by the same norm in the direction of the masked gradient, so that no variant
    harms less only because it moves less. A mean over which task is relabelled.

    Returns:
        ``harm``: rise of the loss on the other tasks, nats a token; ``progress``: fall of the loss on the new labels.
    """
    setting, encoder = SETTINGS[context.scale], Encoder(start.tokenizer, 60)
    device = next(start.model.parameters()).device

    def batch(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {k: v.to(device) for k, v in encoder.batch([encoder.row(row) for row in rows]).items()}

    def loss(model: Any, rows: Sequence[Example]) -> torch.Tensor:
        inputs = batch(rows)
        labels = inputs.pop("labels")
        return answer_loss(model(**inputs), labels)

    rises, falls = [], []
    for number, task in enumerate(start.old):
        renamed = dict(zip(task.labels, (*task.labels[1:], task.labels[0]), strict=True))
        train = [Example(row.prompt, renamed[row.answer]) for row in task.train]
        test = [Example(row.prompt, renamed[row.answer]) for row in task.test]
        others = [row for i, other in enumerate(start.old) if i != number for row in other.test]
        model = _copy(start.model).train()
        mask = MIGUMask(model, copy.copy(MASKS[variant])) if variant in MASKS else None
        weights = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
        with torch.no_grad():
            before, unlearnt = loss(model, others), loss(model, test)
        for step in range(setting.harm_steps):
            rows = [train[(step * 16 + i) % len(train)] for i in range(16)]
            model.zero_grad()
            loss(model, rows).backward()
            if mask is not None:
                mask.apply()
            norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
            with torch.no_grad():
                for p in weights:
                    if p.grad is not None:
                        p -= 0.3 * p.grad / norm
        with torch.no_grad():
            rises.append(float(loss(model, others) - before))
            falls.append(float(unlearnt - loss(model, test)))
    return {"harm": sum(rises) / len(rises), "progress": sum(falls) / len(falls)}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> Measurements:
    """Measures one seed."""
    start = prepare_model(context, seed)
    found: dict[str, dict[str, float]] = {}
    for name, share in overlap(start).items():
        found[name] = {"overlap": share}
    for variant in TUNED:
        choice, rate = prepared["chosen"][variant], prepared["chosen"]["ft"]
        found[variant] = stream(context, start, variant, choice, seed, rate)
        if variant in MASKS or variant == "ft":
            found[variant] |= harm(context, start, variant)
        context.report(f"seed {seed}, {variant}: accuracy {found[variant]['accuracy']:.2f}")
    return found


CLAIM = Claim(
    method="migu",
    statement=(
        "Of a stream of tasks, MIGU keeps more than fine-tuning and than as many random rows, with all learning rates "
        "tuned; its rows are the tasks' own, and updating them harms other tasks less than an update of equal norm "
        "elsewhere."
    ),
    paper=(
        "T5-large, mean accuracy after 4 / 15 tasks: MIGU 78.8 / 73.8, fine-tuning 75.7 / 68.3; rows chosen by "
        "gradient 78.4 / 72.3, by weight 77.2 / 71.3 (arXiv 2406.17245)."
    ),
    metrics={
        "accuracy": Metric(name="ACC", better="higher"),
        "forgetting": Metric(name="forgetting", better="lower"),
        "learning": Metric(name="learning accuracy", better="higher"),
        "overlap": Metric(name="shared rows", better="lower"),
        "harm": Metric(name="harm to known tasks", unit="nats a token", better="lower"),
        "progress": Metric(name="progress on the new labels", unit="nats a token", better="higher"),
    },
    variants={
        "migu": "MIGU, T = 0.7",
        "ft": "full fine-tuning",
        "random": "random rows, T = 0.7",
        "low": "rows of least magnitude, T = 0.7",
        "replay": "fine-tuning with 2% replay",
        "ewc": "elastic weight consolidation",
        "other": "loud rows of two tasks",
        "same": "loud rows of two halves of one task",
    },
    bars=(
        Bar(
            statement="MIGU's accuracy after the last task is above fine-tuning's",
            method="migu", baseline="ft", metric="accuracy",
        ),
        Bar(
            statement="MIGU's accuracy after the last task is above that with random rows",
            method="migu", baseline="random", metric="accuracy",
        ),
        Bar(
            statement="MIGU forgets less than fine-tuning",
            method="migu", baseline="ft", metric="forgetting",
        ),
        Bar(
            statement="two tasks share at least 0.2 fewer of their loud rows than two halves of one task",
            method="other", baseline="same", metric="overlap", margin=0.2,
        ),
        Bar(
            statement="at equal norm, MIGU's update harms known tasks less than a full update",
            method="migu", baseline="ft", metric="harm",
        ),
        Bar(
            statement="at equal norm, MIGU's update harms known tasks less than one of the rows of least magnitude",
            method="migu", baseline="low", metric="harm",
        ),
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (1, 2, 3), "gpu": (1, 2, 3), "miniature": (1, 2)},
    notes=(
        "A Llama of two layers and width 64, trained from scratch on three generated tasks together and then on three "
        "others one after the other, 80 steps each; embeddings and the tied head are not masked, as in the paper. Each "
        "variant had four runs of search on a seed of its own: a learning rate (7e-4, 1.4e-3, 2.8e-3, 5.6e-3), EWC its "
        "weight at fine-tuning's rate. The paper's models are pre-trained on the web, and their outputs may be of "
        "other kinds: a model of this size cannot show the published gains, only whether the mechanism is at work. "
        "LoRA is not measured here. Harm and progress: one known task is given other labels and trained on by 20 steps "
        "of equal norm."
    ),
)  # fmt: skip
