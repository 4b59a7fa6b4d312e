"""DeCoRe from a file of settings or from flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelwright.decoding.decore.decoding import DeCoRe


@dataclass(kw_only=True)
class DeCoReOptions:
    """Pushes the model away from itself without its retrieval heads, towards what the context says."""

    heads: Annotated[
        Path | None, Arg("Head scores, as modelwright heads detect writes them, or published ones.", kind="input")
    ] = None
    top: Annotated[int, Arg("How many of the best heads the twin lacks.")] = 20
    head: Annotated[list[str], Arg("Heads that the twin lacks, such as 12-3, in place of a file.")] = field(
        default_factory=list
    )
    random_seed: Annotated[int | None, Arg("Control: as many other heads, drawn at random with this seed.")] = None
    alpha: Annotated[
        float | Literal["entropy", "entropy-gain"], Arg("Strength: a number, entropy, or entropy-gain.")
    ] = "entropy"
    alpha_cap: Annotated[float | None, Arg("Greatest strength.")] = None
    scale_alpha: Annotated[bool, Arg("Divide entropies by the logarithm of the vocabulary's size.")] = False
    relative_top: Annotated[
        float | None, Arg("Keep tokens with this fraction of the best one's probability; for sampling, 0.1.")
    ] = None
    ablation: Annotated[
        Literal["zero", "uniform", "mean"], Arg("What switching a head off means: zero, uniform or mean.")
    ] = "zero"
    means: Annotated[Path | None, Arg("For the ablation mean: safetensors with 'means'.", kind="input")] = None
    mask_from: Annotated[
        Literal["last", "all"], Arg("Heads are off from the prompt's last token on, or for all: last or all.")
    ] = "last"
    amateur: Annotated[
        str | None, Arg("A smaller model that is the twin, with its own --heads: a folder or a hub id.", kind="input")
    ] = None
    pad_vocabulary: Annotated[
        bool, Arg("The amateur's table of tokens may be padded to another size, as among Qwen2.5's models.")
    ] = False
    dtype: Annotated[str, Arg("Of the amateur: auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the amateur.")] = False
    batch: Annotated[bool, Arg("Model and twin as rows of one batch.", kind="run")] = True

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DeCoRe:
        """Reads heads and amateur, and returns what ``generate(custom_generate=…)`` takes.

        Args:
            model: The model; a file of another model's heads is refused.
            tokenizer: Its tokenizer; an amateur that brings another is refused.

        Raises:
            UserError: A setting is out of range, or a file cannot be used.
        """
        from modelwright.decoding.companion import load_companion
        from modelwright.decoding.decore.decoding import DeCoReConfig, decore_generate

        amateur = None
        if self.amateur is not None:
            amateur = load_companion(
                self.amateur, model, tokenizer, what="amateur", dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
            )  # fmt: skip
        decoding = decore_generate(
            DeCoReConfig(
                self._heads(model if amateur is None else amateur), alpha=self.alpha, alpha_cap=self.alpha_cap,
                scale_alpha=self.scale_alpha, relative_top=self.relative_top, ablation=self.ablation,
                mask_from=self.mask_from, amateur=amateur, means=self._means(), batch=self.batch,
                pad_vocabulary=self.pad_vocabulary,
            )
        )  # fmt: skip
        decoding.check(model)
        return decoding

    def _heads(self, owner: PreTrainedModel) -> list[tuple[int, int]]:
        from modelwright.decoding.decore.ablation import random_heads
        from modelwright.decoding.decore.heads import HeadScores, head_of

        if (self.heads is None) == (not self.head):
            raise UserError("Say which heads to switch off: by a file with --heads, or one by one with --head.")
        if self.heads is not None:
            found = HeadScores.load_json(self.heads, owner).top(self.top)
        else:
            found = [head_of(name) for name in self.head]
        if self.random_seed is not None:
            return random_heads(owner, len(found), seed=self.random_seed, exclude=found)
        return found

    def _means(self) -> Any:
        if self.means is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.means)["means"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{self.means} is no safetensors file with a tensor 'means'.") from error
