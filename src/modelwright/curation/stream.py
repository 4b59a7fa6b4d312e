"""Choosing from a pool of any size: files are streamed, and a run that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np

from modelwright.curation.choose import Rule, choose
from modelwright.curation.overlap import HeldOut
from modelwright.curation.scoring import (
    Columns,
    ScoreLog,
    TokenCounter,
    Watched,
    run_key,
    score_records,
    utf8_length,
)
from modelwright.curation.select import check_rule, make_report, token_counter
from modelwright.curation.selector import Selector
from modelwright.data import Record, Records, write_rows
from modelwright.data.write import check_format
from modelwright.errors import UserError, did_you_mean
from modelwright.files import atomic_path, check_output
from modelwright.progress import Progress, Silent

#: Seconds of scoring after which a mistake in the rule does not throw the scores away.
_WORTH_KEEPING = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """What :func:`select_records` writes.

    Attributes:
        chosen: The chosen rows, each with ``score`` and ``rank`` (1 = best); the suffix names the format.
        order: ``rank``: best first; ``pool``: as in the pool.
        scores: The score of every document of the pool, with ``index`` and ``rank``, if wanted.
        force: Whether existing files are replaced.
    """

    chosen: Path
    order: Literal["rank", "pool"] = "rank"
    scores: Path | None = None
    force: bool = False

    def check(self, records: Records) -> None:
        """Refuses what cannot be written, before any work."""
        read = {source.path.resolve() for source in records.sources if source.path is not None}
        for path in (self.chosen, self.scores):
            if path is not None:
                check_output(path, self.force)
                check_format(path)
                if path.resolve() in read:
                    raise UserError(f"{path} is both pool and output: choose another output.")


def select_records(
    selector: Selector,
    records: Records,
    target: Sequence[str],
    rule: Rule,
    outputs: Outputs,
    *,
    tokenizer: Any = None,
    group_field: str | None = None,
    target_groups: Sequence[str] = (),
    heldout: HeldOut | None = None,
    drop_contaminated: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Chooses from a pool of any size and writes the chosen rows.

    The pool is read twice: once to score it, once to write. Memory holds a few dozen bytes per document. Scores are
    kept in the folder ``<output>.scoring`` while the work lasts, so that the same call continues a run that was killed.

    Args:
        selector: The method, not fitted yet.
        records: The pool.
        target: Texts of the kind that is wanted; may be empty if the method needs none.
        rule: How many documents to keep.
        outputs: What to write.
        tokenizer: Hugging Face tokenizer, path or hub id; needed for a token budget.
        group_field: Field that names a document's group, for the composition of the selection.
        target_groups: Groups that are wanted: gives ``precision`` and ``recall``.
        heldout: Held-out documents to check the selection against.
        drop_contaminated: Whether documents that share an n-gram with a held-out one are dropped before choosing.
        workers: Processes that the method may use.
        progress: Where to tell how far it is.

    Returns:
        JSON-able numbers: the fields of :class:`SelectionReport`, and ``groups``, ``pool_groups``, ``precision``,
        ``recall``, ``contamination``, ``examples`` (the first and last chosen), ``seconds``.

    Raises:
        UserError: Faulty data or a rule that cannot be met. Nothing half-written is left.
    """
    outputs.check(records)
    check_rule(selector, rule)
    progress = progress or Silent()
    started = time.monotonic()
    count_tokens = token_counter(tokenizer) if tokenizer is not None else None
    if rule.token_budget is not None and count_tokens is None:
        raise UserError(
            "A token budget needs a tokenizer: give one (--tokenizer), or use a byte budget (--byte-budget)."
        )
    if drop_contaminated and heldout is None:
        raise UserError("Dropping contaminated documents needs held-out documents: give them (--heldout).")
    columns = Columns(
        tokens=count_tokens if rule.token_budget is not None else None,
        hashes=rule.dedup,
        group_field=group_field,
        heldout=heldout if drop_contaminated else None,
    )
    watched = Watched(records, progress, "reading the pool's statistics") if selector.needs_pool else None
    progress.start("learning from the target", None)
    selector.fit(target, watched)
    more = [str(tokenizer) if columns.tokens else None, _heldout_key(heldout) if drop_contaminated else None]
    key = run_key(selector, target, records, columns, more)
    folder = outputs.chosen.with_name(outputs.chosen.name + ".scoring")
    with _only_run(outputs.chosen, folder):
        log = ScoreLog(folder, key, columns.dtype)
        try:
            total = watched.count if watched else None
            table = score_records(selector, records, columns, log, progress, workers, total)
            composition = _Composition(table, log.groups, target_groups) if group_field else None
            chosen = _choose(table, rule, progress)
            summary = _write(
                records, table, chosen, outputs, log, count_tokens, group_field, heldout, columns, progress
            )
        except UserError as error:
            # After a full disk, or much work, the scores are worth more than a tidy folder.
            if not isinstance(error.__cause__, OSError) and time.monotonic() - started < _WORTH_KEEPING:
                log.remove()
            raise
        log.remove()
    if composition:
        summary |= composition.of(chosen)
    return summary | {"seconds": time.monotonic() - started}


@contextlib.contextmanager
def _only_run(output: Path, folder: Path) -> Iterator[None]:
    """Lets one run at a time write an output and its folder of scores."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"Another run is writing {output}: wait for it, or choose another output.") from error
    try:
        yield
    finally:
        # Removed before it is released: afterwards it could be another run's lock already.
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _heldout_key(heldout: HeldOut | None) -> Any:
    return None if heldout is None else heldout.fingerprint()


def _choose(table: np.ndarray, rule: Rule, progress: Progress) -> np.ndarray:
    def column(name: str) -> np.ndarray | None:
        return table[name] if name in (table.dtype.names or ()) else None

    scores = np.ascontiguousarray(table["score"])
    if unscored := int(np.isnan(scores).sum()):
        progress.message(f"{unscored:,} of {len(scores):,} documents have no score (blank, or dropped by the method).")
    chosen = choose(
        scores,
        rule,
        lengths=column("length"),
        tokens=column("tokens"),
        hashes=column("hash"),
        blocked=column("blocked"),
    )
    if rule.top is not None and len(chosen) < rule.top and rule.token_budget is None and rule.byte_budget is None:
        progress.message(f"Only {len(chosen):,} documents qualify, fewer than the {rule.top:,} asked for.")
    return chosen


def _write(
    records: Records,
    table: np.ndarray,
    chosen: np.ndarray,
    outputs: Outputs,
    log: ScoreLog,
    count_tokens: TokenCounter | None,
    group_field: str | None,
    heldout: HeldOut | None,
    columns: Columns,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the chosen rows and, if wanted, all scores; returns what was seen on the way."""
    rank = np.zeros(len(table), dtype=np.int32)
    rank[chosen] = np.arange(1, len(chosen) + 1)
    seen = _Seen(count_tokens, heldout, group_field, len(chosen))

    def picked() -> Iterator[tuple[Record, int]]:
        progress.start("writing", len(chosen))
        left = len(chosen)
        for record in records:
            if record.index >= len(table) or (
                rank[record.index] and utf8_length(record.text) != table["length"][record.index]
            ):
                raise UserError(f"{record.where} changed while the pool was being read: run it again.")
            if place := int(rank[record.index]):
                seen.note(record, place, float(table["score"][record.index]))
                yield record, place
                progress.advance()
                left -= 1
                if left == 0:
                    return

    rows: Iterator[dict[str, Any]] = (
        {**r.row, "score": float(table["score"][r.index]), "rank": place} for r, place in picked()
    )
    if outputs.order == "rank":
        rows = _sorted_on_disk(rows, len(chosen), log.folder)
    with contextlib.ExitStack() as both:
        if outputs.scores is not None:
            # In place only when the chosen rows are: a disk that fills up leaves neither of them.
            staged = both.enter_context(atomic_path(outputs.scores, outputs.force))
            write_rows(staged, _all_scores(table, rank, log.groups))
        write_rows(outputs.chosen, rows, outputs.force)
    tokens = int(table["tokens"][chosen].sum(dtype=np.int64)) if columns.tokens else seen.tokens
    report = make_report(np.ascontiguousarray(table["score"]), table["length"], chosen, tokens)
    summary = dataclasses.asdict(report) | {"examples": seen.examples()}
    if heldout is not None:
        summary["contamination"] = seen.contamination()
        summary["contamination"]["dropped"] = int(table["blocked"].sum()) if columns.heldout else 0
    return summary


def _sorted_on_disk(rows: Iterable[dict[str, Any]], count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Gives rows in the order of their rank with flat memory: they wait in a temporary file."""
    starts = np.zeros(count, dtype=np.int64)
    # Pickle keeps dates and bytes as they are; the file is our own and is gone afterwards.
    with tempfile.TemporaryFile(dir=folder) as spool:
        for row in rows:
            starts[row["rank"] - 1] = spool.tell()
            pickle.dump(row, spool, protocol=pickle.HIGHEST_PROTOCOL)
        for start in starts.tolist():
            spool.seek(start)
            yield pickle.load(spool)


def _all_scores(table: np.ndarray, rank: np.ndarray, groups: list[str]) -> Iterator[dict[str, Any]]:
    names = [n for n in ("tokens",) if n in (table.dtype.names or ())]
    for index, record in enumerate(table):
        row: dict[str, Any] = {"index": index, "score": float(record["score"]), "bytes": int(record["length"])}
        row |= {name: int(record[name]) for name in names}
        if groups:
            row["group"] = groups[record["group"]]
        yield row | {"rank": int(rank[index]) or None}


@dataclasses.dataclass
class _Seen:
    """What is noted of the chosen documents while they are written."""

    count_tokens: TokenCounter | None
    heldout: HeldOut | None
    group_field: str | None
    count: int
    token_total: int = 0
    contaminated: int = 0
    heldout_hit: set[int] = dataclasses.field(default_factory=set)
    overlaps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    shown: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> int | None:
        return self.token_total if self.count_tokens else None

    def note(self, record: Record, rank: int, score: float) -> None:
        if self.count_tokens:
            self.token_total += self.count_tokens([record.text])[0]
        if self.heldout and (hit := self.heldout.shared(record.text)):
            self.contaminated += 1
            self.heldout_hit.update(hit)
            self.overlaps.append({"where": record.where, "rank": rank, "shared": next(iter(hit.values()))})
            self.overlaps.sort(key=lambda o: o["rank"])
            del self.overlaps[5:]
        if rank <= 5 or rank > self.count - 3:
            excerpt = record.text if len(record.text) <= 300 else record.text[:300] + "…"
            example = {"rank": rank, "score": score, "where": record.where, "text": excerpt}
            if self.group_field:
                example["group"] = str(record.row.get(self.group_field, "(none)"))
            self.shown.append(example)

    def examples(self) -> list[dict[str, Any]]:
        return sorted(self.shown, key=lambda e: e["rank"])

    def contamination(self) -> dict[str, Any]:
        assert self.heldout is not None
        return {
            "ngram_words": self.heldout.n,
            "heldout_documents": self.heldout.documents,
            "heldout_too_short": self.heldout.ignored,
            "heldout_found_in_selection": len(self.heldout_hit),
            "contaminated_documents": self.contaminated,
            "examples": self.overlaps,
        }


class _Composition:
    """Counts by group and, given the wanted groups, the selection's precision and recall."""

    def __init__(self, table: np.ndarray, groups: list[str], target_groups: Sequence[str]) -> None:
        for wanted in target_groups:
            if wanted not in groups:
                raise UserError(
                    f"No document is of the group '{wanted}' (--target-group): {did_you_mean(wanted, groups)}"
                )
        self.of_document, self.groups = table["group"], groups
        self.wanted = np.isin(groups, list(target_groups))

    def of(self, chosen: np.ndarray) -> dict[str, Any]:
        pool = np.bincount(self.of_document, minlength=len(self.groups))
        picked = np.bincount(self.of_document[chosen], minlength=len(self.groups))
        found: dict[str, Any] = {
            "groups": {g: int(n) for g, n in zip(self.groups, picked) if n},
            "pool_groups": {g: int(n) for g, n in zip(self.groups, pool)},
        }
        if self.wanted.any():
            found["precision"] = float(picked[self.wanted].sum() / len(chosen))
            found["recall"] = float(picked[self.wanted].sum() / pool[self.wanted].sum())
        return found
