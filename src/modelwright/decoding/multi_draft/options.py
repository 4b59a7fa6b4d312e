"""Multi-draft decoding from a file of settings or from flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelwright.decoding.multi_draft.decoding import MultiDraftDecoding


@dataclass(kw_only=True)
class MultiDraftOptions:
    """Several drafts a step, verified at once: the model's own output law, several tokens a call."""

    draft: Annotated[
        list[str], Arg("Draft models: folders or hub ids; each gives --num-drafts drafts.", kind="input")
    ] = field(default_factory=list)
    num_drafts: Annotated[int, Arg("Drafts a step, of each source.")] = 2
    draft_length: Annotated[int, Arg("Tokens a draft.")] = 4
    verifier: Annotated[str, Arg("balanced, is, optimal, priority, spectr, specinfer or single.")] = "balanced"
    lp_size: Annotated[int, Arg("For is: tokens whose pairs are variables of the linear program.")] = 5
    alphabet_size: Annotated[int | None, Arg("For is: likely tokens that go before all others.")] = 40
    order: Annotated[str, Arg("For is: order of tokens, difference (the paper's) or ratio.")] = "difference"
    draft_temperature: Annotated[float, Arg("Flattens the draft law, on top of the temperature.")] = 1.0
    prompt_lookup: Annotated[bool, Arg("Copy drafts from what followed the last tokens before.")] = False
    early_exit: Annotated[int | None, Arg("Layers of the model after which it drafts for itself.")] = None
    layout: Annotated[str, Arg("How drafts are scored in one call: auto, tree or rows.", kind="run")] = "auto"
    pad_vocabulary: Annotated[bool, Arg("Allow tables of another size for the same tokenizer.")] = False
    dtype: Annotated[str, Arg("Of draft models: auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with a draft model.")] = False

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> MultiDraftDecoding:
        """Loads the draft models and returns what ``generate(custom_generate=…)`` takes.

        Args:
            model: The target; draft models go to its device.
            tokenizer: Its tokenizer; a draft model that brings another is refused.

        Raises:
            UserError: A setting is out of range, or a draft model cannot be loaded or has another tokenizer.
        """
        from modelwright.decoding.companion import load_companion
        from modelwright.decoding.multi_draft.decoding import MultiDraftDecoding

        if not self.draft and not self.prompt_lookup and self.early_exit is None:
            raise UserError("There is nothing to draft with: give draft, early_exit or prompt_lookup.")
        options = {
            name: getattr(self, name)
            for name in (
                "num_drafts", "draft_length", "verifier", "draft_temperature", "prompt_lookup", "early_exit", "layout",
                "pad_vocabulary", "lp_size", "alphabet_size", "order",
            )
        }  # fmt: skip
        if self.draft:
            drafts = [
                load_companion(path, model, tokenizer, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
                for path in self.draft
            ]
            return MultiDraftDecoding(drafts, **options)
        return MultiDraftDecoding(**options)
