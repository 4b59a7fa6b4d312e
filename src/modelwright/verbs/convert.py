"""`modelwright convert`: a checkpoint of one architecture to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Convert:
    """Convert a model to another architecture, keeping its weights.

    `modelwright convert resformer --model my-llama --output my-resformer` adds learnable value residuals that start
    where the checkpoint is, so continued training has no jump in its loss. `plain` fills a pruned model up with
    zeros to one of its own family, for programs that know no other.
    """

    architecture: Annotated[
        str, Arg("Architecture to convert to: resformer, svformer; plain for a pruned model.", positional=True)
    ]
    model: Annotated[str, Arg("Model folder or hub id to convert.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    set: Annotated[dict[str, Any], Arg("Setting of the architecture, such as mode=constant; repeatable.")] = field(
        default_factory=dict
    )
    trust_remote_code: Annotated[bool, Arg("Run code that comes with the model. Only for models you trust.")] = False
    force: Annotated[bool, Arg("Replace the output if it exists.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Loads, converts and saves the model, with its tokenizer if it has one.

        Raises:
            UserError: The model cannot be read or converted, or a setting is unknown.
        """
        import warnings

        from modelwright import catalog, files
        from modelwright.errors import UserError

        files.check_output(self.output, self.force)
        convert = catalog.load("converters", self.architecture)
        settings = _checked(convert, self.set)

        from modelwright.models.loading import load_model, load_tokenizer, save_model

        progress.start(f"Convert {self.model} to {self.architecture}", total=3)
        model = load_model(self.model, trust_remote_code=self.trust_remote_code)
        try:
            tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        except UserError as error:
            tokenizer = None
            progress.message(f"Converted without a tokenizer: {error}")
        progress.advance(note="loaded")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            converted = convert(model, **settings)
        for warning in caught:
            progress.message(str(warning.message))
        progress.advance(note="converted")
        save_model(converted, tokenizer, self.output, force=self.force)
        progress.advance(note="saved")
        return {
            "output": str(self.output),
            "architecture": converted.config.model_type,
            "from": model.config.model_type,
            "parameters": sum(p.numel() for p in converted.parameters()),
            "parameters_before": sum(p.numel() for p in model.parameters()),
            "warnings": [str(w.message) for w in caught],
        }


def _checked(convert: Any, settings: dict[str, Any]) -> dict[str, Any]:
    import inspect

    from modelwright.errors import UserError, did_you_mean
    from modelwright.values import parse_value

    known = [p.name for p in inspect.signature(convert).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise UserError(f"--set {name}: the conversion has no such setting; {did_you_mean(name, known)}")
    # On the command line everything is text: 0.5, null and [2, 3] mean what they do in a recipe.
    return {name: parse_value(value) if isinstance(value, str) else value for name, value in settings.items()}
