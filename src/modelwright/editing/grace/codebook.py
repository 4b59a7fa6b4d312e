"""GRACE's codebook: which keys there are, how far each reaches, and what adding, growing and splitting do to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from modelwright.errors import UserError

#: What is taken from the older of two balls that touch, so that no query lies in both (the paper's 1e-5).
GAP = 1e-5
#: By how much more than the distance a ball grows, relatively: in another batch the same query is rounded differently.
SLACK = 1e-4

Case = Literal["add", "grow", "split"]


@dataclass(frozen=True)
class Entry:
    """One edit, as it was made.

    Attributes:
        id: Name of the edit.
        key: (d_ff,) float32: the input of the layer at the last token of the prompt.
        label: The target's token ids. They are compared as they are.
        value: (d,) float32: what the layer shall put out instead, as it was after this edit's training.
        radius: Radius that it was made with; None takes the codebook's.
    """

    id: str
    key: torch.Tensor
    label: tuple[int, ...]
    value: torch.Tensor
    radius: float | None = None


@dataclass
class Record:
    """One ball of the codebook.

    Attributes:
        key: (d_ff,) float32, its centre.
        value: (d,) float32, the layer's output inside it.
        radius: Queries within this Euclidean distance belong to it; below 0 it holds none.
        label: Token ids of its target.
        entries: Ids of the edits that it serves.
    """

    key: torch.Tensor
    value: torch.Tensor
    radius: float
    label: tuple[int, ...]
    entries: list[str]


class Codebook:
    """Records of keys, values, radii and labels (algorithm 1 of the paper).

    It keeps the edits in their order and derives the records from them, so that an edit can be deleted: the records are
    then those that the others alone had made.

    Args:
        radius: Radius of a new record (the paper's ε_init).
        entries: Edits, in order.
    """

    def __init__(self, radius: float = 1.0, entries: Iterable[Entry] = ()) -> None:
        self.radius = radius
        self.entries: list[Entry] = []
        self.records: list[Record] = []
        self._stacked: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        for entry in entries:
            self.add(entry)

    def case(
        self, key: torch.Tensor, label: tuple[int, ...], radius: float | None = None
    ) -> tuple[Case, int | None, float]:
        """Returns what an edit would do, the nearest record (None if there is none), and its distance.

        Args:
            key: (d_ff,).
            label: Token ids of the target.
            radius: Of a new record; None takes the codebook's.
        """
        radius = self.radius if radius is None else radius
        if not self.records:
            return "add", None, float("inf")
        distances = _distances(key[None].float(), torch.stack([r.key for r in self.records]))[0]
        distances[torch.tensor([r.radius < 0 for r in self.records])] = float("inf")
        near = int(_nearest(distances[None])[0])
        distance = float(distances[near])
        record = self.records[near]
        if distance > radius + record.radius:
            return "add", near, distance
        return ("grow" if record.label == label else "split"), near, distance

    def add(self, entry: Entry) -> int:
        """Puts an edit in and returns the number of the record that serves it.

        Far from all others it makes a record. Where it meets one of another label it makes one too, and both take half
        the distance as their radius. Where it meets one of the same label that one grows to hold it, and takes its
        value. An edit at the very key of another (the same fact, edited anew) takes that one's ball over: half of no
        distance would leave neither a ball that survives rounding (ours).
        """
        radius = self.radius if entry.radius is None else entry.radius
        case, near, distance = self.case(entry.key, entry.label, radius)
        self.entries.append(entry)
        self._stacked = None
        if case == "grow" and near is not None:
            record = self.records[near]
            record.radius = max(record.radius, distance * (1 + SLACK))
            record.value = entry.value
            record.entries.append(entry.id)
            return near
        record = Record(entry.key, entry.value, radius, entry.label, [entry.id])
        if case == "split" and near is not None:
            anew = distance <= SLACK * float(entry.key.float().norm())
            record.radius, self.records[near].radius = (
                (self.records[near].radius, -GAP) if anew else (distance / 2, distance / 2 - GAP)
            )
        self.records.append(record)
        return len(self.records) - 1

    def delete(self, id: str) -> None:
        """Takes an edit out: what it had split or grown is as if it had never been.

        Raises:
            UserError: There is no such edit.
        """
        kept = [entry for entry in self.entries if entry.id != id]
        if len(kept) == len(self.entries):
            raise UserError(f"The codebook holds no edit '{id}'.")
        self._rebuild(kept)

    def set_value(self, value: torch.Tensor) -> None:
        """Gives the last edit, and so the record that serves it, another value (d,), such as the trained one."""
        before = self.entries[-1].value
        self.entries[-1] = replace(self.entries[-1], value=value)
        next(record for record in self.records if record.value is before).value = value
        self._stacked = None

    def _rebuild(self, entries: list[Entry]) -> None:
        self.entries, self.records, self._stacked = [], [], None
        for entry in entries:
            self.add(entry)

    def copy(self) -> Codebook:
        """Returns a codebook that can be changed without changing this one."""
        new = Codebook(self.radius)
        new.entries = list(self.entries)
        new.records = [replace(record, entries=list(record.entries)) for record in self.records]
        return new

    def described(self) -> list[dict[str, Any]]:
        """Returns the records as JSON: of key and value the numbers of the entries that they come from."""
        keys = {id(entry.key): number for number, entry in enumerate(self.entries)}
        values = {id(entry.value): number for number, entry in enumerate(self.entries)}
        return [
            {"key": keys[id(r.key)], "value": values[id(r.value)], "radius": r.radius, "entries": list(r.entries)}
            for r in self.records
        ]

    @classmethod
    def of_records(cls, radius: float, entries: Sequence[Entry], records: Iterable[Mapping[str, Any]]) -> Codebook:
        """Returns the codebook that :meth:`described` was asked of: to add a thousand entries again takes long."""
        new = cls(radius)
        new.entries = list(entries)
        for row in records:
            made, value = entries[row["key"]], entries[row["value"]].value
            new.records.append(Record(made.key, value, row["radius"], made.label, list(row["entries"])))
        return new

    def look_up(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns the record that each query belongs to: that of the nearest key, if the query is within its radius.

        Of keys at the same distance the latest counts.

        Args:
            queries: (n, d_ff), any floating-point dtype.

        Returns:
            (n,) int64, −1 for queries that lie in no ball.
        """
        found = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
        if not self.records or not len(queries):
            return found
        queries = queries.float()
        keys, _, radii = self.stacked(queries.device)
        # A matrix product finds the few queries that may lie in a ball; only theirs are worth exact distances.
        norms = queries.square().sum(1, keepdim=True) + keys.square().sum(1)
        rough = norms - 2 * queries @ keys.T
        rows = (rough <= (1.01 * radii.clamp(min=0)).square() + 1e-4 * norms).any(1).nonzero()[:, 0]
        if len(rows):
            distances = _distances(queries[rows], keys).masked_fill(radii < 0, float("inf"))
            near = _nearest(distances)
            inside = distances.gather(1, near[:, None])[:, 0] <= radii[near]
            found[rows] = torch.where(inside, near, -1)
        return found

    def stacked(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns keys (n, d_ff), values (n, d) and radii (n,), float32 on a device."""
        if self._stacked is None or self._stacked[0].device != device:
            self._stacked = (
                torch.stack([r.key for r in self.records]).to(device, torch.float32),
                torch.stack([r.value for r in self.records]).to(device, torch.float32),
                torch.tensor([r.radius for r in self.records], device=device),
            )
        return self._stacked


def _distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    # Not by a matrix product, whose rounding would give a query some distance from itself.
    return torch.cdist(queries, keys.to(queries), compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(distances: torch.Tensor) -> torch.Tensor:
    return distances.shape[1] - 1 - distances.flip(1).argmin(1)
