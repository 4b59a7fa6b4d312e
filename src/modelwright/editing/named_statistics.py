"""Key statistics as a command is given them: a file of them, or text from which they are collected first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.data import Records
from modelwright.editing.editor import Editor
from modelwright.editing.statistics import KeyStatistics
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class NamedStatistics:
    """Gives key statistics to those of a command's editors that take them.

    Args:
        given: A file of statistics (``.safetensors``); or text, such as JSONL, Parquet or a folder; or None.
        editors: Editors, which do not have their statistics yet.
        output: What the command writes. Statistics that are collected are kept beside it, in
            ``OUTPUT.keys.safetensors``, and read from there by the next run.

    Raises:
        UserError: There is no such file or text.
    """

    def __init__(self, given: str | Path | None, editors: Iterable[Editor], output: Path) -> None:
        self._takers: list[Any] = [e for e in editors if hasattr(e, "statistics")] if given is not None else []
        self._records: Records | None = None
        self.path = Path(given) if given is not None else None
        if given is None:
            return
        if not str(given).endswith(".safetensors"):
            self._records = Records(str(given))
            beside = output if output.name else output.resolve()  # "." has no name
            self.path = beside.with_name(beside.name + ".keys.safetensors")
        elif not Path(given).is_file():
            raise UserError(
                f"{given} does not exist: give a file that modelwright edit statistics wrote, or text to collect key "
                f"statistics from."
            )
        for editor in self._takers:
            editor.statistics = str(self.path)

    def collect(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        n_tokens: int = 1_000_000,
        progress: Progress | None = None,
    ) -> None:
        """Collects what was given as text, for all layers that the editors ask for; a stopped run is continued.

        Args:
            model: The model that will be edited.
            tokenizer: Its tokenizer.
            n_tokens: Tokens to see; fewer if the text ends before.
            progress: Where to tell how far it is.

        Raises:
            UserError: See :meth:`KeyStatistics.collect`.
        """
        if self._records is None or not self._takers:
            return
        depth = len(roles(model).layers)
        layers = sorted({layer for editor in self._takers for layer in editor.layers_of(depth)})
        KeyStatistics.collect(
            model, tokenizer, self._records, layers, n_tokens=n_tokens, path=self.path, progress=progress
        )
