"""`modelwright train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Train:
    """Train a causal language model: a new one (--architecture), or a checkpoint further (--model).

    Documents are joined and cut into blocks. Interrupted or killed, the same command continues where it was.
    """

    data: Annotated[list[str], Arg("Training documents: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    architecture: Annotated[str | None, Arg("Train from scratch: a transformers model_type, or resformer …")] = None
    model: Annotated[str | None, Arg("Continue this checkpoint: a folder or a hub id.", kind="input")] = None
    set: Annotated[dict[str, Any], Arg("A field of the new model's config, such as hidden_size=256.")] = field(
        default_factory=dict
    )
    attention: Annotated[
        str | None, Arg("Train with this attention, by name or as 'name: {option: value}'; the checkpoint keeps it.")
    ] = None
    tokenizer: Annotated[str | None, Arg("Tokenizer: a folder or a hub id; the model's by default.", kind="input")] = (
        None
    )
    eval_data: Annotated[list[str], Arg("Held-out documents, for bits per byte.", kind="input")] = field(
        default_factory=list
    )
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    steps: Annotated[int | None, Arg("Optimizer steps.")] = None
    epochs: Annotated[float | None, Arg("Passes over the data, instead of --steps.")] = None
    tokens: Annotated[int | None, Arg("Tokens to train on, instead of --steps.")] = None
    batch_size: Annotated[int, Arg("Blocks per device and forward pass.")] = 8
    block_size: Annotated[int, Arg("Tokens per block.")] = 512
    gradient_accumulation: Annotated[int, Arg("Forward passes per step.")] = 1
    learning_rate: Annotated[float, Arg("Peak learning rate.")] = 1e-3
    schedule: Annotated[Literal["cosine", "linear", "constant"], Arg("Shape after the warm-up.")] = "cosine"
    warmup: Annotated[float, Arg("Warm-up: steps if 1 or more, else the fraction of all steps.")] = 0.03
    min_lr_ratio: Annotated[float, Arg("Last learning rate over the peak.")] = 0.1
    weight_decay: Annotated[float, Arg("Weight decay of matrices; norms, biases and scalars have none.")] = 0.1
    beta1: Annotated[float, Arg("AdamW's decay of the gradient's mean.")] = 0.9
    beta2: Annotated[float, Arg("AdamW's decay of the gradient's square.")] = 0.95
    clip: Annotated[float, Arg("Largest norm of the gradient; 0 for none.")] = 1.0
    seed: Annotated[int, Arg("Seed of weights, order of data and dropout.")] = 0
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Arg("auto: bfloat16 where the GPU has it.")] = "auto"
    gradient_checkpointing: Annotated[bool, Arg("Recompute activations to save memory.")] = False
    compile: Annotated[bool, Arg("Compile the model with torch.compile.")] = False
    log_every: Annotated[int, Arg("Steps between rows of training_log.jsonl.")] = 10
    eval_every: Annotated[int, Arg("Steps between evaluations on --eval-data; 0: at the end only.")] = 0
    save_every: Annotated[int, Arg("Steps between checkpoints; 0: by time only.", kind="run")] = 0
    save_minutes: Annotated[float, Arg("Minutes between checkpoints; 0: by steps only.", kind="run")] = 5.0
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Trains; returns steps, tokens, parameters, tokens_per_second, train_seconds, final_loss and more."""
        from modelwright.training.causal_lm import as_options
        from modelwright.training.run import train_to_folder

        return train_to_folder(
            self.data,
            self.output,
            as_options(self),
            model=self.model,
            architecture=self.architecture,
            settings=self.set,
            attention=self.attention,
            tokenizer=self.tokenizer,
            eval_data=self.eval_data,
            text_field=self.text_field,
            trust_remote_code=self.trust_remote_code,
            force=self.force,
            progress=progress,
        )
