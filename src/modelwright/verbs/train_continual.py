"""`modelwright train continual`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class TrainContinual:
    """Train a causal language model on one task after the other, and measure all of them after each.

    Ends in a model folder with the accuracy matrix, its heat map and a page. Interrupted or killed, also between two
    tasks, the same command continues where it was. On several devices: torchrun --nproc-per-node=8 -m modelwright train
    continual …
    """

    model: Annotated[str, Arg("Checkpoint to train: a folder or a hub id.", kind="input")]
    tasks: Annotated[str, Arg("The stream: a YAML file of tasks, or the folder of a task_stream world.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    with_: Annotated[list[str], Arg("Mask the gradients by this method, such as migu.")] = field(default_factory=list)
    options: Annotated[dict[str, Any], Arg("The method's options, such as threshold=0.9.")] = field(
        default_factory=dict
    )
    tuning: Annotated[
        Literal["full", "lora", "inc-lora", "o-lora"],
        Arg("All weights; one adapter; one for each task; one for each task, orthogonal to the earlier ones."),
    ] = "full"
    replay: Annotated[float, Arg("Share of the earlier tasks' rows that is trained on again, such as 0.02.")] = 0.0
    ewc: Annotated[float, Arg("Weight of elastic weight consolidation; 0: none.")] = 0.0
    ewc_samples: Annotated[int, Arg("Examples of a task that EWC looks at.")] = 200
    mask_first_task: Annotated[bool, Arg("Mask during the first task too.")] = False
    steps: Annotated[int | None, Arg("Optimizer steps of each task.")] = None
    epochs: Annotated[float | None, Arg("Passes over each task, instead of --steps; 1 by default.")] = None
    batch_size: Annotated[int, Arg("Examples per device and forward pass.")] = 64
    gradient_accumulation: Annotated[int, Arg("Forward passes per step.")] = 1
    learning_rate: Annotated[float | None, Arg("Peak learning rate; by default 1e-4, with adapters 1e-3.")] = None
    schedule: Annotated[Literal["cosine", "linear", "constant"], Arg("Shape after the warm-up.")] = "constant"
    warmup: Annotated[float, Arg("Warm-up: steps if 1 or more, else the fraction of a task's steps.")] = 0.0
    weight_decay: Annotated[float, Arg("Weight decay of matrices; norms, biases and scalars have none.")] = 0.01
    beta1: Annotated[float, Arg("AdamW's decay of the gradient's mean.")] = 0.9
    beta2: Annotated[float, Arg("AdamW's decay of the gradient's square.")] = 0.999
    clip: Annotated[float, Arg("Largest norm of the gradient; 0 for none.")] = 1.0
    max_tokens: Annotated[int, Arg("Longest prompt; longer ones lose their middle.")] = 512
    new_tokens: Annotated[int | None, Arg("Tokens of an answer; the longest label's by default.")] = None
    lora_rank: Annotated[int, Arg("Rank of adapters.")] = 8
    lora_alpha: Annotated[float, Arg("Adapters are scaled by this over the rank.")] = 32.0
    lora_dropout: Annotated[float, Arg("Dropout before adapters.")] = 0.05
    lora_targets: Annotated[str, Arg("Layers with adapters: all-linear, or names with commas between.")] = "all-linear"
    orthogonality: Annotated[float, Arg("Weight of O-LoRA's penalty.")] = 0.5
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    seed: Annotated[int, Arg("Seed of the order of data, of adapters and of dropout.")] = 0
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Arg("auto: bfloat16 where the GPU has it.")] = "auto"
    gradient_checkpointing: Annotated[bool, Arg("Recompute activations to save memory.")] = False
    log_every: Annotated[int, Arg("Steps between rows of training_log.jsonl.")] = 10
    save_every: Annotated[int, Arg("Steps between checkpoints; 0: by time only.", kind="run")] = 0
    save_minutes: Annotated[float, Arg("Minutes between checkpoints; 0: by steps only.", kind="run")] = 5.0
    eval_batch_size: Annotated[int, Arg("Prompts at once when answers are written.", kind="run")] = 64
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Trains; returns accuracy, learning_accuracy, forgetting, backward_transfer, matrix, steps and more."""
        import dataclasses

        from modelwright.report.continual import render_continual, write_heat_map
        from modelwright.training.continual.options import as_options
        from modelwright.training.continual.run import train_stream_to_folder

        def finish(document: dict[str, Any], folder: Path) -> None:
            name = f"{Path(self.model).name} with {', '.join([self.tuning, *self.with_])}"
            render_continual(document, folder / "report.html", title=f"{name}: {len(document['rows'])} tasks")
            matrix = document["matrix"]
            write_heat_map(
                folder / "accuracy.png", "Accuracy (%)", matrix["tasks"], matrix["tasks"], matrix["rows"], "on", "after"
            )

        options = dataclasses.replace(self)
        if options.steps is None and options.epochs is None:
            options.epochs = 1.0
        if options.learning_rate is None:
            options.learning_rate = 1e-4 if self.tuning == "full" else 1e-3
        targets = tuple(name.strip() for name in self.lora_targets.split(","))
        # One plain name is a name too: peft would take it for an expression of the whole dotted name.
        if len(targets) > 1 or targets[0].replace(".", "_").isidentifier():
            options.lora_targets = targets  # type: ignore[assignment]
        return train_stream_to_folder(
            self.tasks,
            self.output,
            as_options(options),
            model=self.model,
            methods=self.with_,
            method_options=self.options,
            tokenizer=self.tokenizer,
            trust_remote_code=self.trust_remote_code,
            force=self.force,
            progress=progress,
            finish=finish,
        )
