"""Options that several verbs have, with the words that explain them: ``device: arguments.Device = "auto"``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from modelwright.options import Arg

Model = Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
Tokenizer = Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")]
Dtype = Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")]
Device = Annotated[str, Arg("auto, cpu, cuda …", kind="run")]
TrustRemoteCode = Annotated[bool, Arg("Run Python code that comes with the model.")]

# Of verbs that ask a model questions.
Layout = Annotated[
    Literal["auto", "chat", "qa", "raw"], Arg("How to ask; auto is the chat template where there is one, else qa.")
]
NewTokens = Annotated[int, Arg("Tokens of an answer at most.")]
Judge = Annotated[str | None, Arg("Model that decides where the rule finds no match.", kind="input")]

# Of verbs that compare editors.
Statistics = Annotated[
    str | None,
    Arg(
        "Key statistics for ROME, MEMIT and PMET (modelwright edit statistics); or text to collect them from first: a "
        "million tokens, kept in OUTPUT.keys.safetensors.",
        kind="input",
    ),
]
EditorOptions = Annotated[dict[str, Any], Arg("Options of the editors, such as rome.layer=5.")]
