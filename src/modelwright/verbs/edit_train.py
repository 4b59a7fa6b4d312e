"""`modelwright edit train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress
from modelwright.verbs import arguments


@dataclass(kw_only=True)
class EditTrain:
    """Train what an editor needs before it can edit a model: MEND's networks, or SERAC's classifier and small model.

    The folder that is written is then named with --set trained=FOLDER where edits are made. A run that was stopped is
    continued by the same command.
    """

    method: Annotated[str, Arg("Editor to train: mend or serac.", positional=True)]
    model: Annotated[str, Arg("Model that will be edited: a folder or hub id.", kind="input")]
    requests: Annotated[
        list[str],
        Arg("Facts to train on, such as the later ones: JSONL, JSON, CSV or Parquet. May be repeated.", kind="input"),
    ]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="editor")]
    tokenizer: Annotated[str | None, Arg("Tokenizer, if it is not the model's own.", kind="input")] = None
    locality: Annotated[
        list[str],
        Arg("Texts that no edit must touch; by default the other facts' prompts. May be repeated.", kind="input"),
    ] = field(default_factory=list)
    text_field: Annotated[str, Arg("Field that holds the text, in the files of --locality.")] = "text"
    set: Annotated[
        dict[str, Any], Arg("An option of the editor, such as steps=5000 (see modelwright show METHOD).")
    ] = field(default_factory=dict)
    dtype: Annotated[str, Arg("Type of the model's weights, such as float32; auto: the checkpoint's.")] = "auto"
    device: arguments.Device = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Trains; returns steps, loss, best_step, best_validation_loss and resumed_from.

        Raises:
            UserError: Bad options, requests or model.
        """
        import json
        import shutil

        from modelwright import catalog
        from modelwright.curation.selector import make_part
        from modelwright.data import read_texts
        from modelwright.editing import read_requests
        from modelwright.errors import UserError, did_you_mean
        from modelwright.files import check_output
        from modelwright.models.loading import load_model, load_tokenizer

        check_output(self.output, self.force)
        if self.method not in (known := catalog.provided("trainable_editors")):
            raise UserError(f"There is no editor '{self.method}' that is trained: {did_you_mean(self.method, known)}")
        editor = make_part(catalog.load("trainable_editors", self.method), self.method, self.set)
        requests = read_requests(self.requests)
        texts = read_texts(self.locality, self.text_field) if self.locality else []
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        checkpoint = self.output.with_name(f".{self.output.name}.unfinished")
        if self.force and checkpoint.is_dir():
            try:
                shutil.rmtree(checkpoint)
            except OSError as error:
                raise UserError(f"{checkpoint} cannot be removed: {error.strerror}.") from error
        report = editor.train(model, tokenizer, requests, locality=texts, checkpoint=checkpoint, progress=progress)
        editor.save(self.output, force=self.force)
        shutil.rmtree(checkpoint, ignore_errors=True)
        return {"method": self.method, "output": str(self.output), **json.loads(json.dumps(report))}
