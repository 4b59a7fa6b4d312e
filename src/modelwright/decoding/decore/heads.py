"""Scores of retrieval heads, kept with the fingerprint of the model they were measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError
from modelwright.files import read_json, write_json
from modelwright.models.heads import Head, check_heads, fingerprint, head_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1


@dataclass(frozen=True)
class HeadScores:
    """How much of a needle each attention head copied, sample by sample.

    Attributes:
        scores: Head to its score in each sample that was kept, between 0 and 1.
        fingerprint: Of the model; None in files that were published without one.
        settings: What the scores were measured with.
    """

    scores: Mapping[Head, Sequence[float]]
    fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def means(self) -> dict[Head, float]:
        """Returns each head's mean score, best first; heads of equal score stand in the model's order."""
        found = {head: math.fsum(values) / len(values) if values else 0.0 for head, values in self.scores.items()}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def samples(self) -> int:
        """Samples that were kept."""
        return max(map(len, self.scores.values()), default=0)

    def top(self, count: int) -> list[Head]:
        """Returns the heads of the greatest mean score, best first.

        Raises:
            UserError: There are not so many heads, or nothing was measured.
        """
        if not self.samples:
            raise UserError("No sample was kept, so there is no ranking of heads.")
        if not 1 <= count <= len(self.scores):
            raise UserError(f"The top {count} heads are wanted: give a number from 1 to {len(self.scores)}.")
        return list(self.means())[:count]

    def check(self, model: PreTrainedModel, source: str = "The head scores") -> None:
        """Refuses scores of another model.

        Args:
            model: The model that they are to be used with.
            source: What to call them in the message.

        Raises:
            UserError: The fingerprint is another's, or a head is not in the model.
        """
        if self.fingerprint is not None and self.fingerprint != fingerprint(model):
            raise UserError(
                f"{source} were measured on another model (or on other weights of this one): measure them anew with "
                f"modelwright heads detect."
            )
        try:
            check_heads(self.scores, head_layers(model))
        except UserError as error:
            raise UserError(f"{source} are another model's: {error}") from error

    def save_json(self, path: str | Path, force: bool = False) -> None:
        """Writes the scores.

        Raises:
            UserError: The file exists and ``force`` is off.
        """
        rows = {f"{layer}-{head}": [round(v, 6) for v in values] for (layer, head), values in self.scores.items()}
        document = {
            "format": FORMAT, "fingerprint": self.fingerprint, "settings": dict(self.settings),
            "samples": self.samples, "heads": rows,
        }  # fmt: skip
        write_json(path, document, force)

    @classmethod
    def load_json(cls, path: str | Path, model: PreTrainedModel | None = None) -> HeadScores:
        """Reads scores: a file of :meth:`save_json`, or a published one, ``{"layer-head": [score, …], …}``.

        Args:
            path: The file.
            model: If given, a file of another model is refused.

        Raises:
            UserError: The file is neither, or another model's.
        """
        document = read_json(path)
        own = isinstance(document, dict) and isinstance(document.get("heads"), dict)
        rows = document["heads"] if own else document
        try:
            scores = {head_of(name): [float(v) for v in values] for name, values in rows.items()}
        except (AttributeError, TypeError, ValueError, UserError) as error:
            raise UserError(
                f'{path} holds no head scores: it should map heads such as "12-3" to lists of numbers.'
            ) from error
        if not scores or not all(math.isfinite(v) for values in scores.values() for v in values):
            raise UserError(f"{path} holds no head scores, or scores that are not numbers.")
        found = cls(scores, document.get("fingerprint"), document.get("settings") or {}) if own else cls(scores)
        if model is not None:
            found.check(model, f"The scores in {path}")
        return found


def head_of(name: str) -> Head:
    """Reads a head such as ``12-3``.

    Raises:
        UserError: It is none.
    """
    try:
        layer, head = name.split("-")
        return int(layer), int(head)
    except (AttributeError, ValueError) as error:
        raise UserError(f"'{name}' is no head: write layer and head, such as 12-3.") from error
