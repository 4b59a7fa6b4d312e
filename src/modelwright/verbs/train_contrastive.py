"""`modelwright train contrastive`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class TrainContrastive:
    """Train a dual encoder of images and texts, or a text-embedding model, on pairs, with batches of any size.

    The memory needed is that of --mini-batch-size pairs. Interrupted or killed, the same command continues where it
    was. On several devices: torchrun --nproc-per-node=8 -m modelwright train contrastive …
    """

    data: Annotated[list[str], Arg("Pairs: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    model: Annotated[
        str | None,
        Arg("Train this further: CLIP, SigLIP …, or any encoder of texts: a folder or hub id.", kind="input"),
    ] = None
    architecture: Annotated[Literal["clip", "siglip"] | None, Arg("Train a new model instead.")] = None
    set: Annotated[dict[str, Any], Arg("A field of the new model's config, such as hidden_size=256.")] = field(
        default_factory=dict
    )
    tokenizer: Annotated[str | None, Arg("Tokenizer of the new model: a folder or a hub id.", kind="input")] = None
    eval_data: Annotated[list[str], Arg("Held-out pairs, for retrieval (recall@k).", kind="input")] = field(
        default_factory=list
    )
    query_field: Annotated[str | None, Arg("Field of the image or query; found by its name by default.")] = None
    key_field: Annotated[str | None, Arg("Field of the text that belongs to it; found by its name by default.")] = None
    negative_field: Annotated[str | None, Arg("Field of hard negatives; found by its name by default.")] = None
    base: Annotated[Path | None, Arg("Folder that paths of images start from; the data file's by default.")] = None
    skip_bad: Annotated[
        bool, Arg("Look at all pairs first, leave out those whose image or text cannot be used, and count them.")
    ] = False
    select: Annotated[str | None, Arg("Choose each batch from a larger one by this method, such as jest.")] = None
    reference: Annotated[str | None, Arg("Reference model of the selection: a folder or a hub id.", kind="input")] = (
        None
    )
    filter_ratio: Annotated[float | None, Arg("Share of the larger batch that the selection leaves out.")] = None
    options: Annotated[dict[str, Any], Arg("The selection's other options (see modelwright show METHOD).")] = field(
        default_factory=dict
    )
    steps: Annotated[int | None, Arg("Optimizer steps.")] = None
    epochs: Annotated[float | None, Arg("Passes over the data, instead of --steps.")] = None
    batch_size: Annotated[int, Arg("Pairs that the loss sees at once, over all processes together.")] = 1024
    mini_batch_size: Annotated[
        int, Arg("Pairs in the encoder at a time, on each process: memory, not the result, depends on it.")
    ] = 128
    learning_rate: Annotated[float, Arg("Peak learning rate.")] = 1e-4
    schedule: Annotated[Literal["cosine", "linear", "constant"], Arg("Shape after the warm-up.")] = "cosine"
    warmup: Annotated[float, Arg("Warm-up: steps if 1 or more, else the fraction of all steps.")] = 0.03
    min_lr_ratio: Annotated[float, Arg("Last learning rate over the peak.")] = 0.0
    optimizer: Annotated[Literal["adamw", "adafactor"], Arg("adafactor needs less memory.")] = "adamw"
    weight_decay: Annotated[float, Arg("Weight decay of matrices; norms, biases and the scale have none.")] = 0.1
    beta1: Annotated[float, Arg("AdamW's decay of the gradient's mean.")] = 0.9
    beta2: Annotated[float, Arg("AdamW's decay of the gradient's square.")] = 0.98
    clip: Annotated[float, Arg("Largest norm of the gradient; 0 for none.")] = 1.0
    objective: Annotated[
        Literal["auto", "softmax", "sigmoid"],
        Arg("Loss: softmax (CLIP, InfoNCE) or sigmoid (SigLIP); auto: the model's."),
    ] = "auto"
    directions: Annotated[
        Literal["auto", "both", "one"],
        Arg("Of the softmax loss; one: query to key. auto: both for image-text, one for text-text."),
    ] = "auto"
    block_size: Annotated[int | None, Arg("Side of the loss's tiles; chosen by default.", kind="run")] = None
    freeze: Annotated[Literal["none", "image", "text"], Arg("Tower that is not trained; image is LiT.")] = "none"
    scale: Annotated[float | None, Arg("Fix the multiplier of the cosines; learned by default.")] = None
    pooling: Annotated[Literal["auto", "mean", "cls", "last"], Arg("Of a text encoder's hidden states.")] = "auto"
    max_tokens: Annotated[int | None, Arg("Longest text in tokens; the model's own by default.")] = None
    gradient_checkpointing: Annotated[bool, Arg("Recompute activations within a mini-batch too.")] = False
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Arg("auto: bfloat16 where the GPU has it.")] = "auto"
    seed: Annotated[int, Arg("Seed of the order of data, of dropout, of the selection and of a new model.")] = 0
    workers: Annotated[int, Arg("Processes that read and prepare pairs; 0: none beside this one.", kind="run")] = 2
    log_every: Annotated[int, Arg("Steps between rows of training_log.jsonl.")] = 10
    eval_every: Annotated[int, Arg("Steps between evaluations on --eval-data; 0: at the end only.")] = 0
    save_every: Annotated[int, Arg("Steps between checkpoints; 0: by time only.", kind="run")] = 0
    save_minutes: Annotated[float, Arg("Minutes between checkpoints; 0: by steps only.", kind="run")] = 5.0
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Trains; returns steps, pairs, pairs_per_second, final_loss, scale, eval_query_to_key_r1 … and more."""
        from modelwright.training.contrastive.run import as_options, train_pairs_to_folder

        named = {"reference": self.reference, "filter_ratio": self.filter_ratio}
        return train_pairs_to_folder(
            self.data,
            self.output,
            as_options(self),
            model=self.model,
            architecture=self.architecture,
            settings=self.set,
            tokenizer=self.tokenizer,
            eval_data=self.eval_data,
            fields={
                "query_field": self.query_field,
                "key_field": self.key_field,
                "negative_field": self.negative_field,
                "base": self.base,
            },
            select=self.select,
            select_options={**self.options, **{k: v for k, v in named.items() if v is not None}},
            skip_bad=self.skip_bad,
            trust_remote_code=self.trust_remote_code,
            force=self.force,
            progress=progress,
        )
