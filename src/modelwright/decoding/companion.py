"""Loading a second model that reads the same tokens: a draft, an amateur."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_companion(
    path: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    what: str = "draft model",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a model to the device of another, with whose tokenizer it will be used.

    Args:
        path: Folder or hub id.
        model: The model that it goes with.
        tokenizer: That model's tokenizer.
        what: What to call it in messages.
        dtype: Its dtype.
        trust_remote_code: Whether to run its own code.

    Raises:
        UserError: It cannot be loaded, or brings a tokenizer with other tokens.
    """
    from modelwright.models.loading import find_folder, load_model, load_tokenizer

    folder = find_folder(path, code=trust_remote_code)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        own, wanted = load_tokenizer(folder, trust_remote_code=trust_remote_code).get_vocab(), tokenizer.get_vocab()
        # Special tokens are added to one model of a family and not to another; ordinary ones must agree.
        if clash := next((t for t in own.keys() & wanted.keys() if own[t] != wanted[t]), None):
            raise UserError(
                f"The {what} {path} has another tokenizer than the target ({clash!r} is token {own[clash]} of one "
                f"and {wanted[clash]} of the other): it must read the target's tokens."
            )
        if len(own.keys() & wanted.keys()) < 0.98 * min(len(own), len(wanted)):
            raise UserError(
                f"The {what} {path} has another tokenizer than the target (they share "
                f"{len(own.keys() & wanted.keys()):,} of {len(wanted):,} tokens): it must read the target's tokens."
            )
    return load_model(folder, dtype=dtype, device=model.device, trust_remote_code=trust_remote_code)
