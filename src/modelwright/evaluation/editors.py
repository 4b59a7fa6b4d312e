"""What the two benchmarks of editing need to know of editors: their options, and where they put a fact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright import catalog
from modelwright.editing.editor import Editor, make_editor
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout

#: What ``all`` stands for: the seven of the benchmark's paper.
SEVEN = ("ft-l", "ft-m", "lora", "rome", "memit", "ice", "grace")


def writes_prompt(editor: Editor) -> bool:
    """Whether an editor puts its facts before the question, so that its request should be the bare question.

    An editor of a third party says so by ``in_prompt = True``.
    """
    return bool(getattr(editor, "in_prompt", editor.name == "ice"))


def describe(editor: Editor) -> str:
    """Returns an editor's name and options as text that is the same in every process."""
    parts = []
    for option in dataclasses.fields(editor):  # type: ignore[arg-type]
        if not option.init:  # not an option: what the editor keeps for itself, such as the contexts it sampled
            continue
        value = getattr(editor, option.name)
        if not isinstance(value, str | int | float | bool | tuple | list | dict | Path | None):
            value = f"{type(value).__name__} {getattr(value, 'fingerprint', '')}".strip()
        parts.append(f"{option.name}={value!r}")
    return f"{editor.name}({', '.join(parts)})"


def laid_out(requests: Sequence[EditRequest], editor: Editor, layout: Layout) -> list[EditRequest]:
    """Returns requests whose prompts are as they will be asked: a question gets the layout's frame, a cloze stays.

    An editor that writes into the prompt gets them as they are.
    """
    if writes_prompt(editor):
        return list(requests)

    def framed(text: str) -> str:
        return layout.edit_prompt(text) if text.rstrip().endswith("?") else text

    return [
        dataclasses.replace(
            r, prompt=framed(r.text) if r.text.rstrip().endswith("?") else r.prompt,
            paraphrases=tuple(framed(text) for text in r.paraphrase_texts()),
        )
        for r in requests
    ]  # fmt: skip


def editors_by_name(names: Sequence[str], options: Mapping[str, Any] | None = None) -> dict[str, Editor]:
    """Makes editors of the catalog; ``all`` stands for the seven of the paper.

    Args:
        names: Names, each possibly several with commas between.
        options: ``name.option`` to value, such as ``rome.layer``.

    Raises:
        UserError: There is no such editor or option.
    """
    wanted: list[str] = []
    for name in (part.strip().lower().replace("_", "-") for text in names for part in text.split(",")):
        wanted += SEVEN if name == "all" else [name] if name else []
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        raise UserError("No editor is named: give some, such as rome,memit,ft-m, or all.")
    given: dict[str, dict[str, Any]] = {}
    for key, value in (options or {}).items():
        name, dot, option = key.partition(".")
        name = name.replace("_", "-")
        if not dot or name not in wanted:
            raise UserError(
                f"The option '{key}' is for no editor here: write it as editor.option, such as {wanted[0]}.layer."
            )
        given.setdefault(name, {})[option] = value
    return {name: make_editor(name, given.get(name)) for name in wanted}


def available(names: Iterable[str] = SEVEN) -> list[str]:
    """Returns those of some editors that are installed."""
    known = catalog.provided("editors")
    return [name for name in names if name in known]
