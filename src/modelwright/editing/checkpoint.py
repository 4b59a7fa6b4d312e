"""An edited model as an ordinary checkpoint, from which the edits can be taken off again to the last bit.

Beside config and weights lies a folder ``modelwright_edits`` with one numbered folder an edit: the edit, and the
weights that it changed, as they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelwright import files
from modelwright.editing.edit import Edit, WeightEdit, base_fingerprint, edits_on, load_edit
from modelwright.editing.examples import answer_logits, make_examples
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.requests import EditRequest
from modelwright.editing.subject import encode_pair
from modelwright.errors import UserError
from modelwright.models.loading import write_model
from modelwright.models.roles import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Folder inside a checkpoint.
EDITS = "modelwright_edits"


def save_edited(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    edits: Sequence[Edit],
    output: str | Path,
    *,
    source: str | Path | None = None,
    force: bool = False,
) -> None:
    """Puts edits on a model, one after the other, and writes it; the model keeps them.

    Args:
        model: The model that the first edit was fitted on.
        tokenizer: Written beside it.
        edits: What to put on.
        output: Folder to write.
        source: Folder that the model was read from; edits that are noted there are noted in the output too.
        force: Whether to replace the output.

    Raises:
        UserError: An edit changes no weights, or does not fit the model, or the output cannot be written.
    """
    from safetensors.torch import save_file

    for edit in edits:
        if not isinstance(edit, WeightEdit):
            raise UserError(
                f"A {edit.method} edit changes no weights, so no ordinary checkpoint can hold it: keep it as a folder "
                f"of its own (--as-delta) and put it on in Python (load_edit(folder).applied(model))."
            )
    base = base_fingerprint(model)
    earlier = Path(source) / EDITS if source is not None else None
    with files.atomic_path(output, force) as partial:
        partial.mkdir()
        if earlier is not None and earlier.is_dir():
            shutil.copytree(earlier, partial / EDITS)
        for edit in edits:
            assert isinstance(edit, WeightEdit)
            parameters = dict(unwrap(model).named_parameters())
            before = {name: parameters[name].detach().clone() for name in edit.deltas if name in parameters}
            edit.apply_(model)
            folder = partial / EDITS / f"{len(list((partial / EDITS).glob('*'))) + 1:04}"
            edit.write(folder)
            save_file({n: t.cpu().contiguous() for n, t in before.items()}, folder / "originals.safetensors")
        model.config.modelwright_base = base
        model.config.modelwright_edited = model_fingerprint(model)
        write_model(model, tokenizer, partial)


@torch.no_grad()
def take_off_last(
    model: PreTrainedModel, source: str | Path, noted: Sequence[Path] | None = None
) -> tuple[Edit, list[Path]]:
    """Takes the last edit off a model that was read from an edited checkpoint.

    Args:
        model: The model, as read from ``source`` in its own dtype.
        source: The folder.
        noted: Folders of the edits that are on the model still; by default all of the source's.

    Returns:
        The edit, and the folders of those below it.

    Raises:
        UserError: The folder has no edits, or the weights are not those that it was written with.
    """
    from safetensors.torch import load_file

    noted = sorted((Path(source) / EDITS).glob("*")) if noted is None else list(noted)
    if not noted:
        raise UserError(f"{source} has no edits to take off (no folder {EDITS} in it).")
    edit = load_edit(noted[-1])
    originals = load_file(noted[-1] / "originals.safetensors")
    parameters = dict(unwrap(model).named_parameters())
    for name, value in originals.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise UserError(f"{source} has no weight '{name}' of shape {tuple(value.shape)}: its edits are another's.")
        parameters[name].copy_(value)
    if edit.fingerprint is not None and edit.found_on(model) != edit.fingerprint:
        raise UserError(
            f"Without its last edit {source} is not the model that the edit was fitted on: its weights were changed "
            f"afterwards (trained, converted or rounded), so the edit cannot be taken off."
        )
    if len(noted) > 1:
        model.config.modelwright_edited = model_fingerprint(model)
    else:
        for name in ("modelwright_base", "modelwright_edited"):
            if hasattr(model.config, name):
                delattr(model.config, name)
    return edit, list(noted[:-1])


@torch.no_grad()
def says_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    edit: Edit | None = None,
    batch_size: int = 32,
) -> list[bool]:
    """Returns whether every token of each target is the most probable one after the prompt and those before it.

    Args:
        model: The model, with the edit on it if there is one.
        tokenizer: Its tokenizer.
        requests: Whose targets.
        edit: Whose :meth:`~modelwright.editing.edit.Edit.prompt` the prompts go through.
        batch_size: Prompts at once.
    """
    pairs = [(edit.prompt(r.text) if edit is not None else r.text, r.target) for r in requests]
    if any(on.reads_rows for on in edits_on(model)):
        rows = [encode_pair(tokenizer, *pair) for pair in pairs]
        said = {i: logits.argmax(-1).tolist() for i, logits in answer_logits(model, rows, batch_size)}
        return [said[i] == target for i, (_, target) in enumerate(rows)]
    found: list[bool] = []
    for start in range(0, len(pairs), batch_size):
        examples = make_examples(model, tokenizer, pairs[start : start + batch_size])
        logits = model(**examples.inputs).logits
        wrong = (logits[:, :-1].argmax(-1) != examples.input_ids[:, 1:]) & examples.is_target[:, 1:]
        found += (~wrong.any(1)).tolist()
    return found
