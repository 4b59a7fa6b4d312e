"""`modelwright edit`, `edit apply` and `edit revert`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress
from modelwright.verbs import arguments


@dataclass(kw_only=True)
class EditModel:
    """Write facts into a model: an ordinary checkpoint, or with --as-delta a small folder to put on and take off.

    An edited checkpoint holds its edits and the weights that they changed, as they were, in a folder
    `modelwright_edits`: `modelwright edit revert` takes them off to the last bit.
    """

    model: arguments.Model
    method: Annotated[str, Arg("Editor, such as rome, memit, pmet, ft-m, lora, ice or grace.")]
    requests: Annotated[
        list[str],
        Arg(
            "Files of facts with prompt, subject and target (JSONL, JSON, CSV, Parquet); CounterFact and ZsRE are read "
            "as they are. May be repeated.",
            kind="input",
        ),
    ]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="model")]
    as_delta: Annotated[bool, Arg("Write the edit alone.")] = False
    statistics: arguments.Statistics = None
    set: Annotated[
        dict[str, Any], Arg("An option of the editor, such as layer=5 (see its page, or modelwright show METHOD).")
    ] = field(default_factory=dict)
    limit: Annotated[int | None, Arg("Use only this many of the facts.")] = None
    tokenizer: arguments.Tokenizer = None
    dtype: arguments.Dtype = "auto"
    device: arguments.Device = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace the output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Fits and writes; returns how many targets the model says before and after, and what was changed.

        Raises:
            UserError: Bad options, requests or model. Nothing half-written is left.
        """
        import time

        from modelwright.editing import make_editor, read_requests
        from modelwright.editing.checkpoint import save_edited, says_target
        from modelwright.editing.edit import WeightEdit
        from modelwright.editing.named_statistics import NamedStatistics
        from modelwright.files import check_output
        from modelwright.models.loading import load_model, load_tokenizer

        check_output(self.output, self.force)
        options = dict(self.set)
        if self.statistics is not None:
            options["statistics"] = self.statistics
        editor = make_editor(self.method, options)
        statistics = NamedStatistics(self.statistics, [editor], self.output)
        if not self.as_delta and not editor.changes_weights:
            raise self._no_checkpoint()
        requests = read_requests(self.requests, limit=self.limit)
        editor.check(requests)
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        statistics.collect(model, tokenizer, progress=progress)
        before = says_target(model, tokenizer, requests)
        progress.start(f"{self.method}: {len(requests)} facts", total=len(requests))
        started = time.perf_counter()
        edit = editor.fit(model, tokenizer, requests, progress=progress)
        seconds = time.perf_counter() - started
        result: dict[str, Any] = {
            "output": str(self.output),
            "method": self.method,
            "requests": len(requests),
            "says_target_before": sum(before),
        }
        if self.as_delta:
            with edit.applied(model):
                after = says_target(model, tokenizer, requests, edit=edit)
            edit.save(self.output, self.force)
        elif not isinstance(edit, WeightEdit):
            raise self._no_checkpoint()
        else:
            save_edited(model, tokenizer, [edit], self.output, source=self.model, force=self.force)
            after = says_target(model, tokenizer, requests, edit=edit)
        result |= {"says_target_after": sum(after), "seconds_per_edit": seconds / len(requests)}
        if statistics.path is not None:
            result["statistics"] = str(statistics.path)
        if isinstance(edit, WeightEdit):
            weights = dict(model.named_parameters())
            result["change"] = {n: v / float(weights[n].detach().float().norm()) for n, v in edit.norms().items()}
        result["warnings"] = [
            f"The model says the target of {request.text!r} already." for request, was in zip(requests, before) if was
        ][:3]
        if missed := [request for request, now in zip(requests, after) if not now]:
            result["warnings"].append(
                f"With the edit the model does not say {len(missed)} of {len(requests)} targets (that of "
                f"{missed[0].text!r}, for one): {editor.remedy(edit)}."
            )
        return result

    def _no_checkpoint(self) -> Exception:
        from modelwright.errors import UserError

        return UserError(
            f"{self.method} changes no weights, so no ordinary checkpoint can hold its edit: give --as-delta, and use "
            f"it with modelwright generate --with 'edited: {{edit: {self.output}}}', or in Python with "
            f"load_edit('{self.output}').applied(model)."
        )


@dataclass(kw_only=True)
class EditApply:
    """Put saved edits on a model and write it as an ordinary checkpoint; another model than theirs is refused."""

    model: arguments.Model
    edit: Annotated[list[str], Arg("Folder of an edit, in the order of their fits. May be repeated.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    dtype: arguments.Dtype = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace the output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Puts the edits on, one after the other; returns the output and what was put on.

        Raises:
            UserError: An edit does not fit the model, or a folder cannot be read.
        """
        from modelwright.editing import load_edit
        from modelwright.editing.checkpoint import save_edited
        from modelwright.files import check_output
        from modelwright.models.loading import load_model

        check_output(self.output, self.force)
        edits = [load_edit(folder) for folder in self.edit]
        model = load_model(self.model, dtype=self.dtype, device="cpu", trust_remote_code=self.trust_remote_code)
        tokenizer = _tokenizer(self.model, self.trust_remote_code, progress)
        save_edited(model, tokenizer, edits, self.output, source=self.model, force=self.force)
        return {
            "output": str(self.output),
            "edits": len(edits),
            "methods": ", ".join(edit.method for edit in edits),
            "requests": sum(len(edit.requests) for edit in edits),
        }


@dataclass(kw_only=True)
class EditRevert:
    """Take the last edit, or all, off an edited checkpoint: the weights have the bits that they had before."""

    model: Annotated[str, Arg("Folder that modelwright edit or edit apply wrote.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    all: Annotated[bool, Arg("Take all edits off.")] = False
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace the output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Takes edits off and writes the model; returns the output, and edits taken off and left.

        Raises:
            UserError: The folder has no edits, or its weights were changed after them.
        """
        import shutil

        from modelwright.editing.checkpoint import EDITS, take_off_last
        from modelwright.files import atomic_path, check_output
        from modelwright.models.loading import load_model, write_model

        check_output(self.output, self.force)
        model = load_model(self.model, device="cpu", trust_remote_code=self.trust_remote_code)
        tokenizer = _tokenizer(self.model, self.trust_remote_code, progress)
        _, left = take_off_last(model, self.model)
        taken = 1
        while self.all and left:
            _, left = take_off_last(model, self.model, left)
            taken += 1
        with atomic_path(self.output, self.force) as partial:
            partial.mkdir()
            for folder in left:
                shutil.copytree(folder, partial / EDITS / folder.name)
            write_model(model, tokenizer, partial)
        return {"output": str(self.output), "taken_off": taken, "left": len(left)}


def _tokenizer(folder: str, trust_remote_code: bool, progress: Progress) -> Any:
    from modelwright.errors import UserError
    from modelwright.models.loading import load_tokenizer

    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except UserError as error:
        progress.message(f"Written without a tokenizer: {error}")
        return None
