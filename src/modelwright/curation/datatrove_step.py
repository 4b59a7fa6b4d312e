"""Selection as datatrove pipeline steps, so that it runs on datatrove's local, Slurm and Ray executors.

Stage one scores in any number of tasks and keeps, of each task, what could still be chosen; stage two, one task,
merges::

    LocalPipelineExecutor([JsonlReader("pool"), ScoreFilter(selector, top=1000), JsonlWriter("scored")], tasks=8)
    LocalPipelineExecutor([JsonlReader("scored"), KeepBest(top=1000), JsonlWriter("chosen")], tasks=1)

The result is the selection of one process: scores depend on the text alone, and ties go by file name and position.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from modelwright.curation.choose import Rule, choose
from modelwright.curation.scoring import score_texts, utf8_length
from modelwright.curation.select import token_counter
from modelwright.curation.selector import Selector
from modelwright.errors import UserError, require

require("datatrove", "datatrove", "selection as a datatrove pipeline step")

from datatrove.data import Document  # noqa: E402
from datatrove.pipeline.base import PipelineStep  # noqa: E402

_POSITION = "position_in_file"


class KeepBest(PipelineStep):
    """Yields the best-scored documents, best first, with their ``selected_rank`` (1 = best) in the metadata.

    Documents need ``score`` in their metadata, as :class:`ScoreFilter` leaves it. Memory holds about twice what is
    kept.

    Args:
        top: Most documents.
        token_budget: Documents by rank while they fit, counted with ``tokenizer``.
        byte_budget: The same in UTF-8 bytes.
        tokenizer: Folder or hub id of a tokenizer (a name, so that tasks can be sent to other machines).

    Raises:
        UserError: A limit below 1, or a token budget without a tokenizer.
    """

    name = "Keep best"
    type = "🔻 - FILTER"

    def __init__(
        self,
        top: int | None = None,
        token_budget: int | None = None,
        byte_budget: int | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        self.rule = Rule(top=top, token_budget=token_budget, byte_budget=byte_budget)
        if token_budget is not None and tokenizer is None:
            raise UserError("token_budget needs a tokenizer: give its folder or hub id, or use byte_budget.")
        self.tokenizer = tokenizer

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Reads all documents of the task, then yields the kept ones."""
        kept = self._candidates(data or ())
        if not kept:
            return
        top = None if self.rule.top is None else min(self.rule.top, len(kept))
        rule = replace(self.rule, top=top)
        for place, i in enumerate(choose(rule=rule, **self._arrays(kept)).tolist(), 1):
            # Not "rank": datatrove's writers fill ${rank} in a file name from the metadata.
            kept[i].metadata["selected_rank"] = place
            yield kept[i]

    def _candidates(self, documents: Iterable[Document]) -> list[Document]:
        """Returns what could still be chosen among more documents, in order; pruned as they come."""
        kept: list[Document] = []
        stream, size = iter(documents), 4096
        while fresh := list(itertools.islice(stream, size)):
            kept += [d for d in fresh if not math.isnan(d.metadata["score"])]
            # Ties go by file and place in it, which no number of tasks changes.
            kept.sort(key=lambda d: (str(d.metadata.get("file_path", "")), d.metadata.get(_POSITION, 0)))
            kept.sort(key=lambda d: -d.metadata["score"])
            keep, arrays = len(kept), self._arrays(kept)
            limits = ((self.rule.token_budget, arrays["tokens"]), (self.rule.byte_budget, arrays["lengths"]))
            for budget, sizes in limits:
                if budget is not None:
                    # One more than fits: the first that does not fit ends the selection, so it must be seen to.
                    keep = min(keep, int(np.searchsorted(np.cumsum(sizes), budget, side="right")) + 1)
            kept = kept[: keep if self.rule.top is None else min(keep, self.rule.top)]
            size = max(4096, len(kept))
        return kept

    def _arrays(self, documents: list[Document]) -> dict[str, Any]:
        budgeted = self.rule.token_budget is not None
        return {
            "scores": np.array([d.metadata["score"] for d in documents], dtype=np.float64),
            "lengths": np.array([utf8_length(d.text) for d in documents], dtype=np.int64),
            "tokens": np.array([self._tokens(d) for d in documents], dtype=np.int64) if budgeted else None,
        }

    def _tokens(self, document: Document) -> int:
        if "token_count" not in document.metadata:
            if not hasattr(self, "_count"):
                self._count = token_counter(self.tokenizer)
            document.metadata["token_count"] = self._count([document.text])[0]
        return document.metadata["token_count"]


class ScoreFilter(KeepBest):
    """Scores documents with a fitted selector, and drops what cannot be chosen.

    Every document gets ``score`` and ``position_in_file`` (the order of ties) in its metadata. Documents without a
    score are dropped. With a limit, only this task's best are passed on: :class:`KeepBest` merges the tasks.

    Args:
        selector: A fitted method that scores each document by itself.
        threshold: Drop scores that are not above it.
        top: As for :class:`KeepBest`.
        token_budget: As for :class:`KeepBest`.
        byte_budget: As for :class:`KeepBest`.
        tokenizer: As for :class:`KeepBest`.
        batch_size: Documents scored at once.

    Raises:
        UserError: The method scores whole pools only.
    """

    name = "Score"

    def __init__(
        self,
        selector: Selector,
        threshold: float | None = None,
        top: int | None = None,
        token_budget: int | None = None,
        byte_budget: int | None = None,
        tokenizer: str | None = None,
        batch_size: int = 1024,
    ) -> None:
        super().__init__(top, token_budget, byte_budget, tokenizer)
        if selector.whole_pool:
            raise UserError(
                f"{type(selector).__name__} needs the whole pool at once, so it cannot score it in tasks: use "
                f"`modelwright select`."
            )
        self.selector, self.threshold, self.batch_size = selector, threshold, batch_size

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Scores the task's documents and yields the kept ones."""
        scored = self._scored(data or ())
        # Without a limit nothing has to be held back.
        yield from scored if self.rule.keeps_all else self._candidates(scored)

    def _scored(self, documents: Iterable[Document]) -> Iterator[Document]:
        # Each file is read by one task from its beginning, so this counts alike however many tasks there are.
        seen: Counter[Any] = Counter()
        stream = iter(documents)
        while batch := list(itertools.islice(stream, self.batch_size)):
            with self.track_time("batch"):
                scores = score_texts(self.selector, [d.text for d in batch])
            for document, score in zip(batch, scores.tolist()):
                file = document.metadata.get("file_path", "")
                document.metadata["score"], document.metadata[_POSITION] = score, seen[file]
                seen[file] += 1
                self.stat_update("total")
                if math.isnan(score) or (self.threshold is not None and score <= self.threshold):
                    self.stat_update("dropped")
                    continue
                self.stat_update("forwarded")
                yield document
