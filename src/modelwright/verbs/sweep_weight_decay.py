"""`modelwright sweep weight-decay`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class WeightDecay:
    """Train the same model with several weight decays, and see what each does to rare and to frequent tokens.

    Every lambda is trained with every seed. Interrupted or killed, the same command finishes what is missing. The
    folder gets a page with plots (report.html), result.json, and the losses by token type of each run.
    """

    data: Annotated[list[str], Arg("Training documents: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="sweep")]
    architecture: Annotated[str | None, Arg("Train from scratch: a transformers model_type, or resformer …")] = None
    model: Annotated[str | None, Arg("Continue this checkpoint: a folder or a hub id.", kind="input")] = None
    set: Annotated[dict[str, Any], Arg("A field of the new model's config, such as hidden_size=256.")] = field(
        default_factory=dict
    )
    tokenizer: Annotated[str | None, Arg("Tokenizer: a folder or a hub id; the model's by default.", kind="input")] = (
        None
    )
    eval_data: Annotated[list[str], Arg("Held-out documents; a share of the data by default.", kind="input")] = field(
        default_factory=list
    )
    heldout_share: Annotated[float, Arg("Share of the documents held out without --eval-data.")] = 0.05
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    lambdas: Annotated[list[float], Arg("Weight decays.")] = field(
        default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 1.0, 2.0]
    )
    seeds: Annotated[list[int], Arg("Seeds, each with every weight decay.")] = field(
        default_factory=lambda: [0, 1, 2, 3, 4]
    )
    decay_on: Annotated[
        Literal["matrices", "all", "body", "embeddings", "head"],
        Arg("Which parameters decay: matrices leaves out norms and biases, as training does."),
    ] = "matrices"
    checkpoints: Annotated[int, Arg("Measurements after the first, which is of the untrained model.")] = 8
    measure_tokens: Annotated[int, Arg("Tokens of training and of held-out text measured each time, at most.")] = (
        500_000
    )
    base: Annotated[int, Arg("Ratio of the frequency bins' edges.")] = 3
    keep_models: Annotated[bool, Arg("Write each run's model into the folder.")] = False
    steps: Annotated[int | None, Arg("Optimizer steps of a run.")] = None
    epochs: Annotated[float | None, Arg("Passes over the data, instead of --steps.")] = None
    tokens: Annotated[int | None, Arg("Tokens to train on, instead of --steps.")] = None
    batch_size: Annotated[int, Arg("Blocks per forward pass.")] = 8
    block_size: Annotated[int, Arg("Tokens per block.")] = 128
    gradient_accumulation: Annotated[int, Arg("Forward passes per step.")] = 1
    learning_rate: Annotated[float, Arg("Peak learning rate: decay acts as this times lambda.")] = 3e-4
    schedule: Annotated[Literal["cosine", "linear", "constant"], Arg("Shape after the warm-up.")] = "cosine"
    warmup: Annotated[float, Arg("Warm-up: steps if 1 or more, else the fraction of all steps.")] = 0.03
    min_lr_ratio: Annotated[float, Arg("Last learning rate over the peak.")] = 0.1
    beta1: Annotated[float, Arg("AdamW's decay of the gradient's mean.")] = 0.9
    beta2: Annotated[float, Arg("AdamW's decay of the gradient's square.")] = 0.95
    clip: Annotated[float, Arg("Largest norm of the gradient; 0 for none.")] = 1.0
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Arg("auto: bfloat16 where the GPU has it.")] = "auto"
    gradient_checkpointing: Annotated[bool, Arg("Recompute activations to save memory.")] = False
    save_every: Annotated[int, Arg("Steps between checkpoints; 0: by time only.", kind="run")] = 0
    save_minutes: Annotated[float, Arg("Minutes between checkpoints; 0: by steps only.", kind="run")] = 5.0
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished sweep with other options.", kind="run")] = (
        False
    )

    def run(self, progress: Progress) -> dict[str, Any]:
        """Sweeps; returns for each lambda its losses on training and held-out text, and sentences that compare them."""
        from modelwright.probing.fair_lm.sweep import SweepOptions, sweep_to_folder
        from modelwright.report.token_loss import render_sweep
        from modelwright.training.options import TrainingOptions

        names = (
            "steps", "epochs", "tokens", "batch_size", "block_size", "gradient_accumulation", "learning_rate",
            "schedule", "warmup", "min_lr_ratio", "beta1", "beta2", "clip", "precision", "gradient_checkpointing",
            "save_every", "save_minutes", "device",
        )  # fmt: skip
        result = sweep_to_folder(
            self.data,
            self.output,
            TrainingOptions(**{name: getattr(self, name) for name in names}),
            SweepOptions(
                lambdas=tuple(self.lambdas),
                seeds=tuple(self.seeds),
                decay_on=self.decay_on,
                intervals=self.checkpoints,
                measure_tokens=self.measure_tokens,
                heldout_share=self.heldout_share,
                base=self.base,
                keep_models=self.keep_models,
            ),
            model=self.model,
            architecture=self.architecture,
            settings=self.set,
            tokenizer=self.tokenizer,
            eval_data=self.eval_data,
            text_field=self.text_field,
            trust_remote_code=self.trust_remote_code,
            force=self.force,
            draw=lambda found, folder: render_sweep(found, folder / "report.html"),
            progress=progress,
        )
        return {
            "output": str(self.output),
            "page": str(self.output / "report.html"),
            "answers": result["answers"],
            "reference": result["reference"],
            "rows": result["rows"],
        }
