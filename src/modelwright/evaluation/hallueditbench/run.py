"""Single editing: one fact is edited, all its questions are asked, the model is put back, and the next one follows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.editing.edit import Edit
from modelwright.editing.editor import Editor
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.evaluation.asking import LETTER, SHORT, Layout, Turn, answers, layout_for
from modelwright.evaluation.editors import describe, writes_prompt
from modelwright.evaluation.fact_texts import doubt
from modelwright.evaluation.hallueditbench.items import Item, Probe
from modelwright.evaluation.matching import Judge, Protocol, agrees
from modelwright.models.roles import unwrap
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
#: The follow-up that names no fact; the right reply is Yes.
SURE = 'Are you sure of your answer? Respond with "Yes" or "No."'


@dataclass(kw_only=True)
class SingleEditing:
    """The benchmark's loop (arXiv 2410.16251, section 3).

    Under ``protocol="word"`` every editor is asked in the same way. ``protocol="paper"`` repeats the published runs:
    the substring match, and GRACE alone is asked by the bare question, without a cache, for exactly as many tokens as
    the right answer has, which is why its efficacy there is near 100; the turns of its dialogues are as short.

    Attributes:
        editors: Name to editor.
        layout: How to ask; the chat template where there is one by default.
        protocol: Rule of matching and of asking.
        judge: Decides where the rule finds no match.
        turns: Further turns of the robustness test, 10 in the paper; each is asked once with the right reply Yes and,
            in a dialogue of its own, once with the right reply No, for whoever says Yes to everything passes the first.
        sure: Also ask at each turn, in a third dialogue, whether the model is sure; robustness does not count it.
        batch_size: Questions at once.
        fit_batch: Edits that are fitted together, where a method can do that; each is still alone on the model.
        details: What each fit tells, by method, of the last run.
    """

    editors: Mapping[str, Editor]
    layout: Layout | None = None
    protocol: Protocol = "word"
    judge: Judge | None = None
    turns: int = 0
    sure: bool = False
    batch_size: int = 16
    fit_batch: int = 16
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def rows(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[Item],
        *,
        kept: Path | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> list[Row]:
        """Edits and asks; returns a row for each item and method, see :mod:`~.scores`.

        Args:
            model: A causal language model in evaluation mode; it has the same bits afterwards, and after each edit.
            tokenizer: Its tokenizer.
            items: What to edit and ask.
            kept: A JSONL file that takes each row as it comes; the same call continues it after a crash.
            force: Throw away a kept file that belongs to other items, options or another model.
            progress: Counts edits.

        Raises:
            UserError: The kept file is of another run; or an editor refuses a request.
        """
        if self.turns < 0 or self.batch_size < 1 or self.fit_batch < 1:
            raise UserError("turns must be 0 or more, batch_size and fit_batch at least 1.")
        layout, progress = self.layout or layout_for(tokenizer), progress or Silent()
        for editor in self.editors.values():  # now, not after the hours of the editors before it
            for item in items:
                editor.check([self.request(editor, layout, item)])
        every = [name for name, _ in unwrap(model).named_parameters()]
        start = model_fingerprint(model, whole=every)
        store = _Store(kept, self._plan(layout, items, start), force)
        progress.start("edits", len(self.editors) * len(items))
        for chunk in _chunks([item for item in items if item.id not in store.before], 32):
            asked = self._ask_all(model, tokenizer, layout, [(p, ()) for item in chunk for p in item.probes()])
            at = iter(asked)
            for item in chunk:
                store.add_before(item.id, [next(at) for _ in item.probes()])
        for method, editor in self.editors.items():
            waiting = [item for item in items if (method, item.id) not in store.rows]
            progress.advance(len(items) - len(waiting))
            for chunk in _chunks(waiting, self.fit_batch):
                requests = [self.request(editor, layout, item) for item in chunk]
                began = time.perf_counter()
                edits = editor.fit_each(model, tokenizer, requests)
                seconds = (time.perf_counter() - began) / len(chunk)
                for item, edit in zip(chunk, edits, strict=True):
                    self.details.setdefault(method, []).append(edit.details)
                    with edit.applied(model):
                        row = self._row(model, tokenizer, layout, method, editor, item, edit, store.before[item.id])
                    store.add({**row, "seconds": round(seconds, 4)})
                    progress.advance(1, method)
                if model_fingerprint(model, whole=every) != start:
                    raise RuntimeError(f"{method} left the model changed: later answers would not be its own.")
        store.close()
        return [store.rows[method, item.id] for method in self.editors for item in items]

    def request(self, editor: Editor, layout: Layout, item: Item) -> EditRequest:
        """Returns what an editor is given: the question as it will be asked; bare, where facts go into the prompt."""
        prompt = item.question if writes_prompt(editor) else layout.edit_prompt(item.question)
        old = item.wrong if item.wrong and item.wrong.strip() != item.object.strip() else None
        return EditRequest(prompt.replace("{}", "{ }"), item.subject, item.object, old_answer=old or None, id=item.id)

    def _plan(self, layout: Layout, items: Sequence[Item], fingerprint: str) -> dict[str, Any]:
        # The subject, which an item's name holds, and the wrong answer are part of what is edited.
        described = [[item.id, item.wrong, [asdict(p) for p in item.probes()]] for item in items]
        digest = hashlib.sha256(json.dumps(described).encode())
        return {
            "model": fingerprint,
            "items": digest.hexdigest()[:16],
            "editors": {name: describe(editor) for name, editor in self.editors.items()},
            "layout": asdict(layout),
            "protocol": self.protocol,
            "judge": _named(self.judge),
            "turns": self.turns,
            **({"sure": True} if self.sure else {}),
        }

    def _ask_all(
        self, model: Any, tokenizer: Any, layout: Layout, asked: Sequence[tuple[Probe, tuple[Edit, ...]]]
    ) -> list[str]:
        prompts = [
            layout.text(tokenizer, [Turn(p.question)], edits, LETTER if p.kind == "letter" else SHORT)
            for p, edits in asked
        ]
        return answers(model, tokenizer, prompts, layout, batch_size=self.batch_size)

    def _row(
        self,
        model: Any,
        tokenizer: Any,
        layout: Layout,
        method: str,
        editor: Editor,
        item: Item,
        edit: Edit,
        before: list[str],
    ) -> Row:
        probes, bare = item.probes(), self.protocol == "paper" and editor.name == "grace"
        if bare:
            after = [_bare(model, tokenizer, p.question, p.label) for p in probes]
        else:
            after = self._ask_all(model, tokenizer, layout, [(p, (edit,)) for p in probes])
        found = []
        for probe, pre, post in zip(probes, before, after, strict=True):
            label = pre if probe.label is None else probe.label
            # What is the same has stayed, even where no word can be matched, such as an empty answer.
            stayed = probe.label is None and post == pre
            found.append({
                "name": probe.name, "question": probe.question, "label": probe.label, "kind": probe.kind, "pre": pre,
                "post": post, "pre_right": None if probe.label is None else self._right(pre, probe.label, probe.kind),
                "post_right": stayed or self._right(post, label, probe.kind),
            })  # fmt: skip
        row: Row = {"method": method, "item": item.id, "topic": item.topic, "probes": found}
        if self.turns and item.yes_question and item.no_question:
            row["turns"] = self._turns(model, tokenizer, layout, item, edit, after[0], bare)
        return row

    def _right(self, answer: str, label: str, kind: Any) -> bool:
        return agrees(answer, label, kind, self.protocol, self.judge)

    def _turns(
        self, model: Any, tokenizer: Any, layout: Layout, item: Item, edit: Edit, first: str, bare: bool
    ) -> dict[str, list[bool]]:
        follow = {"yes": (doubt(item.yes_question or ""), "Yes"), "no": (doubt(item.no_question or ""), "No")}
        if self.sure:
            follow["sure"] = (SURE, "Yes")
        # The published dialogues of GRACE are in the template, but as short as the object too.
        short: Any = {"new_tokens": _length(tokenizer, item.object), "use_cache": False} if bare else {}
        talks = {name: [Turn(item.question, first)] for name in follow}
        right = {name: [self._right(first, item.object, "text")] for name in follow}
        for _ in range(self.turns):
            prompts = [
                layout.text(tokenizer, [*talks[n], Turn(question)], (edit,)) for n, (question, _) in follow.items()
            ]
            said = answers(model, tokenizer, prompts, layout, batch_size=self.batch_size, **short)
            for (name, (question, label)), answer in zip(follow.items(), said, strict=True):
                talks[name].append(Turn(question, answer))
                right[name].append(self._right(answer, label, "yes_no"))
        return right


def _named(judge: Judge | None) -> str | None:
    if judge is None:
        return None
    model = getattr(judge, "model", None)
    return type(judge).__name__ + (f" {model_fingerprint(model)}" if model is not None else "")


def _bare(model: Any, tokenizer: Any, question: str, label: str | None) -> str:
    length = 16 if label is None else _length(tokenizer, label)
    (found,) = answers(model, tokenizer, [question], Layout(kind="raw"), new_tokens=length, use_cache=False)
    return found


def _length(tokenizer: Any, text: str) -> int:
    return max(1, len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


class _Store:
    """Rows in a JSONL file whose first line is the plan; a torn last line is dropped."""

    def __init__(self, path: Path | None, plan: Mapping[str, Any], force: bool) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.before: dict[str, list[str]] = {}
        self._stream: Any = None
        if path is None:
            return
        header = json.dumps({"plan": plan})
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        whole = text.split("\n")[:-1]  # not splitlines: an answer may hold U+2028, which JSON leaves as it is
        if whole and whole[0] != header:
            if not force:
                raise UserError(
                    f"{path} holds answers of another run (another model, items or options): choose another file, or "
                    f"give --force to throw them away."
                )
            whole = []
        for number, line in enumerate(whole[1:], 2):
            try:
                row = json.loads(line)
                if "before" in row:
                    self.before[row["item"]] = row["before"]
                else:
                    self.rows[row["method"], row["item"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}:{number} is no row of answers ({error!r}): remove the line.") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, so that the torn line of a kill is gone, and then only added to.
        part = path.with_name(path.name + ".part")
        part.write_text("".join(line + "\n" for line in whole or [header]), encoding="utf-8")
        part.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def add_before(self, item: str, said: list[str]) -> None:
        self.before[item] = said
        self._write({"item": item, "before": said})

    def add(self, row: Row) -> None:
        self.rows[row["method"], row["item"]] = row
        self._write(row)

    def _write(self, row: Row) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a kept file.

    Raises:
        UserError: It is none.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if "plan" not in lines[0]:
            raise ValueError("its first line is no plan")
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path} is no file of kept answers: {error}.") from error
    return [line for line in lines if "probes" in line]
