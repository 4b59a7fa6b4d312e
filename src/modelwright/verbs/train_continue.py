"""`modelwright train continue`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class TrainContinue:
    """Continue pre-training on a domain by a recipe, and draw what it cost beside the plain run.

    The best part of the domain (by n-gram perplexity under a reference), several epochs of it, and the rest of every
    epoch as the model was pre-trained on. Probes are dense at first, where a fall is seen. Interrupted or killed, the
    same command continues where it was.
    """

    model: Annotated[str, Arg("Checkpoint to continue: a folder or a hub id.", kind="input")]
    domain: Annotated[list[str], Arg("The domain's documents: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    recipe: Annotated[Literal["stability-gap"], Arg("Recipe.")] = "stability-gap"
    reference: Annotated[list[str], Arg("Good documents of the domain, which rank the others.", kind="input")] = field(
        default_factory=list
    )
    general: Annotated[
        Path | None, Arg("YAML: general sources with data and rates of the original mixture.", kind="input")
    ] = None
    replace: Annotated[list[str], Arg("General source whose share the domain takes, such as the web crawl.")] = field(
        default_factory=list
    )
    probe: Annotated[
        dict[str, Any],
        Arg("Probe questions with choices, name=questions.jsonl. This or --heldout is needed; may be repeated."),
    ] = field(default_factory=dict)
    heldout: Annotated[dict[str, Any], Arg("Probe held-out documents, for bits per byte, name=texts.jsonl.")] = field(
        default_factory=dict
    )
    compare: Annotated[
        list[str],
        Arg(
            "Train this too, for its curve: plain, subset, ranked, replay, rewarm, freeze-top, freeze-bottom, control."
        ),
    ] = field(default_factory=lambda: ["plain"])
    alone: Annotated[bool, Arg("Train the recipe alone, without the plain run beside it.")] = False
    equal_tokens: Annotated[bool, Arg("Give the arms of --compare as many tokens as the recipe.")] = False
    budget_tokens: Annotated[int | None, Arg("Tokens of the plain run; the whole domain once by default.")] = None
    subset_share: Annotated[float, Arg("Tokens of the subset, as a share of the budget.")] = 0.1
    subset_tokens: Annotated[int | None, Arg("Tokens of the subset, instead of --subset-share.")] = None
    best_tokens: Annotated[
        int | None, Arg("Tokens of the best documents that the domain's part is drawn from; the subset's by default.")
    ] = None
    epochs: Annotated[int, Arg("Epochs over the subset.")] = 4
    fixed: Annotated[bool, Arg("Keep the domain's part the same in every epoch, instead of drawing it anew.")] = False
    select: Annotated[str, Arg("Method that ranks the domain: perplexity, dsir, zip-fit …")] = "perplexity"
    options: Annotated[dict[str, Any], Arg("The ranking's own options, such as order=5, min_tokens=32.")] = field(
        default_factory=dict
    )
    strict: Annotated[bool, Arg("Refuse a domain with too few good tokens for the subset.")] = False
    replay: Annotated[float, Arg("Share of general tokens in the arm replay.")] = 0.1
    frozen_layers: Annotated[int, Arg("Layers that the arms freeze-top and freeze-bottom hold still.")] = 5
    rewarm_learning_rate: Annotated[float | None, Arg("Peak of the arm rewarm: that of pre-training.")] = None
    every_tokens: Annotated[int | None, Arg("Tokens between probes after the first; a twentieth of the budget.")] = None
    layer_groups: Annotated[int, Arg("Layers in the lowest and highest groups; 0 measures no updates.")] = 5
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    lora_rank: Annotated[int, Arg("Train LoRA adapters of this rank and merge them; 0: all weights.")] = 0
    batch_size: Annotated[int, Arg("Blocks per device and forward pass.")] = 8
    block_size: Annotated[int, Arg("Tokens per block; the model's context at most.")] = 2048
    gradient_accumulation: Annotated[int, Arg("Forward passes per step.")] = 4
    learning_rate: Annotated[float | None, Arg("Peak; 3e-4 below two billion parameters, 3e-5 above by default.")] = (
        None
    )
    schedule: Annotated[Literal["cosine", "linear", "constant"], Arg("Shape after the warm-up.")] = "cosine"
    warmup: Annotated[float, Arg("Warm-up: steps if 1 or more, else the fraction of all steps.")] = 0.1
    min_lr_ratio: Annotated[float, Arg("Last learning rate over the peak.")] = 0.1
    weight_decay: Annotated[float, Arg("Weight decay of matrices; norms, biases and scalars have none.")] = 0.01
    beta1: Annotated[float, Arg("AdamW's decay of the gradient's mean.")] = 0.9
    beta2: Annotated[float, Arg("AdamW's decay of the gradient's square.")] = 0.95
    clip: Annotated[float, Arg("Largest norm of the gradient; 0 for none.")] = 1.0
    seed: Annotated[int, Arg("Seed of draws, order of data and dropout.")] = 0
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Arg("auto: bfloat16 where the GPU has it.")] = "auto"
    gradient_checkpointing: Annotated[bool, Arg("Recompute activations to save memory.")] = False
    log_every: Annotated[int, Arg("Steps between rows of training_log.jsonl.")] = 10
    save_every: Annotated[int, Arg("Steps between checkpoints; 0: by time only.", kind="run")] = 0
    save_minutes: Annotated[float, Arg("Minutes between checkpoints; 0: by steps only.", kind="run")] = 5.0
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Trains and draws; returns advice, the numbers of every arm, and what was chosen of the domain.

        Raises:
            UserError: Bad options or data. Nothing half-written is left.
        """
        from modelwright.report.stability_gap import render_gap
        from modelwright.training.options import TrainingOptions
        from modelwright.training.stability_gap.run import Continuation, continue_to_folder

        options = TrainingOptions(
            tokens=1,  # set for each arm
            learning_rate=self.learning_rate if self.learning_rate is not None else 0.0,
            **{name: getattr(self, name) for name in _TRAINING},
        )
        work = Continuation(
            compare=[] if self.alone else self.compare,
            select_options=self.options,
            probes={name: str(path) for name, path in self.probe.items()},
            heldout={name: [str(p) for p in _list(paths)] for name, paths in self.heldout.items()},
            **{name: getattr(self, name) for name in _WORK},
        )
        title = f"{Path(self.model).name}, continued"
        return continue_to_folder(
            work,
            self.output,
            options,
            trust_remote_code=self.trust_remote_code,
            force=self.force,
            draw=lambda result, path: render_gap(result, path, title=title),
            progress=progress,
        )


_TRAINING = (
    *("batch_size", "block_size", "gradient_accumulation", "schedule", "warmup", "min_lr_ratio", "weight_decay"),
    *("beta1", "beta2", "clip", "seed", "precision", "gradient_checkpointing", "log_every", "save_every"),
    *("save_minutes", "device"),
)
_WORK = (
    *("model", "domain", "reference", "general", "replace", "select", "budget_tokens", "subset_tokens"),
    *(
        "subset_share",
        "best_tokens",
        "epochs",
        "equal_tokens",
        "replay",
        "fixed",
        "frozen_layers",
        "rewarm_learning_rate",
    ),
    *("every_tokens", "layer_groups", "text_field", "lora_rank", "strict"),
)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
