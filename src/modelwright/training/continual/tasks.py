"""Tasks of a stream: from files of one's own, from the published 15-task benchmark, or from a generated world."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from modelwright.data.records import Records
from modelwright.errors import UserError, did_you_mean
from modelwright.files import read_json
from modelwright.values import Loader

Row = TypeVar("Row")

_TEXTS = ("sentence", "text", "prompt", "question", "input")
_ANSWERS = ("label", "answer", "completion", "target", "output")
_KEYS = ("name", "folder", "train", "test", "labels", "instruction", "text_field", "label_field", "limit", "test_limit")

#: The published orders (paper's appendix) of tasks of the benchmark, by the names of their folders.
ORDERS: dict[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
    "4": (
        *("MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB", "yelp", "amazon", "SST-2", "dbpedia", "agnews"),
        *("MultiRC", "yahoo"),
    ),
    "5": (
        *("MultiRC", "BoolQA", "WiC", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia", "agnews", "yelp"),
        *("amazon", "yahoo"),
    ),
    "6": (
        *("yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia", "agnews", "yahoo"),
        *("MultiRC", "BoolQA", "WiC"),
    ),
}


@dataclass(frozen=True)
class Example:
    """A prompt, and the answer that should follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One task of a stream. Tasks may have different labels: answers are written, not chosen by a head.

    Attributes:
        name: Its name, unique in the stream.
        train: What is trained on.
        test: What accuracy is measured on.
        labels: The answers that there are; those of the training split if not said otherwise.
    """

    name: str
    train: Sequence[Example] = field(repr=False)
    test: Sequence[Example] = field(repr=False)
    labels: tuple[str, ...] = ()


def drawn(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Returns some of the rows at random: files may be sorted by label, or have all labels in turn.

    Args:
        rows: Rows.
        count: How many; all, in another order, if there are no more.
        seed: Decides which.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order[:count].tolist()]


def check_tasks(tasks: Sequence[Task]) -> None:
    """Checks a stream before any work.

    Raises:
        UserError: No task, two of one name, an empty split, or a label that its task does not have.
    """
    if not tasks:
        raise UserError("The stream has no tasks: name at least one.")
    names: set[str] = set()
    for task in tasks:
        if task.name in names:
            raise UserError(f"Two tasks of the stream are called '{task.name}': give each a name of its own.")
        names.add(task.name)
        for split, rows in (("train", task.train), ("test", task.test)):
            if not rows:
                raise UserError(f"Task {task.name} has no {split} split: give it at least one row.")
            for number, row in enumerate(rows):
                if task.labels and row.answer not in task.labels:
                    raise UserError(
                        f"Task {task.name}: row {number + 1} of its {split} split has the label '{row.answer}', which "
                        f"is not among the task's labels ({', '.join(task.labels[:6])}{' …' * (len(task.labels) > 6)})."
                    )


def read_stream(path: str | Path) -> list[Task]:
    """Reads a stream: a YAML file, or the folder of a generated world.

    A YAML file has a list ``tasks``, each with ``train`` and ``test`` (anything that
    :class:`~modelwright.data.records.Records` reads, relative to the file) or ``folder`` (with ``train.*`` and
    ``test.*``), and ``name``, ``labels`` (a list, or a JSON file of one), ``instruction``, ``text_field``,
    ``label_field``, ``limit`` and ``test_limit`` (rows at most); these can also stand beside ``tasks``, for all. Or
    ``benchmark`` (see :func:`read_benchmark`) with ``order`` and ``instructions``; or ``world`` (a folder).

    Raises:
        UserError: The file or a task in it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return world_tasks(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give a YAML file of tasks, or the folder of a world.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}.") from error
    kinds = [kind for kind in ("tasks", "benchmark", "world") if isinstance(raw, dict) and kind in raw]
    if len(kinds) != 1:
        raise UserError(f"{path} should have one of: tasks (a list), benchmark (a folder), world (a folder).")
    base = path.parent
    limits = {key: _limit(raw, key, str(path)) for key in ("limit", "test_limit")}
    if kinds == ["world"]:
        return _limited(world_tasks(base / str(raw["world"])), **limits)
    if kinds == ["benchmark"]:
        order, instructions = raw.get("order", "1"), raw.get("instructions")
        if isinstance(order, str) and order not in ORDERS:
            order = str(base / order)
        found = read_benchmark(base / str(raw["benchmark"]), order, base / instructions if instructions else None)
        return _limited(found, **limits)
    if not isinstance(raw["tasks"], list):
        raise UserError(f"{path}: tasks should be a list.")
    common = {key: value for key, value in raw.items() if key != "tasks"}
    tasks = []
    for number, entry in enumerate(raw["tasks"]):
        entry = {"folder": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise UserError(f"{path}: task {number + 1} should be a folder, or a mapping with train and test.")
        entry = {**common, **entry}
        if unknown := [key for key in entry if key not in _KEYS]:
            raise UserError(f"{path}: task {number + 1} has an unknown key: {did_you_mean(str(unknown[0]), _KEYS)}")
        tasks.append(_read_task(entry, base, f"{path}: task {number + 1}"))
    check_tasks(tasks)
    return tasks


def _limit(entry: Mapping[str, Any], key: str, where: str) -> int | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UserError(f"{where}: {key} should be a number of rows, not {value!r}.")
    return value


def _limited(tasks: list[Task], limit: int | None, test_limit: int | None) -> list[Task]:
    return [Task(t.name, t.train[:limit], t.test[:test_limit], t.labels) for t in tasks]


def _read_task(entry: Mapping[str, Any], base: Path, where: str) -> Task:
    folder = base / str(entry["folder"]) if "folder" in entry else None
    name = str(entry.get("name") or (folder.name if folder else ""))
    if not name:
        raise UserError(f"{where} has no name: give it one.")
    files = {split: entry[split] for split in ("train", "test") if split in entry}
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{where}: {folder} is not a folder.")
        for split in ("train", "test"):
            if split not in files and (found := sorted(folder.glob(f"{split}.*"))):
                files[split] = found[0]
    for split in ("train", "test"):
        if split not in files:
            there = f" in {folder}" if folder else ""
            raise UserError(
                f"Task {name} has no {split} split: give {split}: a file{there and f', or put one{there}'}."
            )
    labels = entry.get("labels")
    if labels is None and folder is not None and (folder / "labels.json").is_file():
        labels = str(folder / "labels.json")
        labels = read_json(labels)
    elif isinstance(labels, str):
        labels = read_json(base / labels)
    splits = {
        split: _rows(_sources(source, base), name, entry.get("text_field"), entry.get("label_field"))
        for split, source in files.items()
    }
    train = splits["train"][: _limit(entry, "limit", where)]
    test = splits["test"][: _limit(entry, "test_limit", where)]
    return make_task(name, train, test, labels=labels, instruction=entry.get("instruction"))


def _sources(source: Any, base: Path) -> list[str]:
    names = source if isinstance(source, list) else [source]
    return [str(base / str(name)) if (base / str(name)).exists() else str(name) for name in names]


def _rows(sources: list[str], name: str, text: str | None, label: str | None) -> list[tuple[str, str]]:
    found = []
    first = next(iter(_anything(sources)))
    text = text or _named(first, _TEXTS, name, "text_field")
    label = label or _named(first, _ANSWERS, name, "label_field")
    for record in Records(sources, text, field_option="text_field"):
        if record.row.get(label, "") is None:
            raise UserError(f"Task {name}: {record.where} has no label ('{label}' is null): leave the row out.")
        if label not in record.row:
            raise UserError(f"Task {name}: {record.where} has no field '{label}': name it with label_field.")
        found.append((record.text, str(record.row[label])))
    return found


def _anything(sources: list[str]) -> Any:
    """Yields rows whose fields are not known yet."""
    records = Records(sources, "text")
    for source in records.sources:
        for row, _ in records._rows(source):
            yield row
    raise UserError(f"{records.name} holds no rows: give a file with at least one.")


def _named(row: Mapping[str, Any], names: Sequence[str], task: str, option: str) -> str:
    for name in names:
        if name in row:
            return name
    raise UserError(
        f"Task {task}: none of its fields ({', '.join(map(str, row))}) is {', '.join(names)}: say {option}."
    )


def make_task(
    name: str,
    train: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]],
    *,
    labels: Sequence[str] | None = None,
    instruction: str | None = None,
) -> Task:
    """Makes a task of texts and labels, with prompts as the benchmark lays them out.

    The prompt is instruction, ``Option: `` with the labels (where labels are given), text and ``Answer:``, as in the
    official code; the answer follows after a space.

    Args:
        name: Its name.
        train: Texts and labels.
        test: The same.
        labels: All labels; if None, those of ``train``, and prompts do not list them.
        instruction: What is asked, before each text.
    """
    head = (instruction or "").rstrip("\n")
    head += "\n" if head else ""
    if labels is not None:
        if not isinstance(labels, Sequence) or isinstance(labels, str) or not labels:
            raise UserError(f"Task {name}: its labels should be a list of texts.")
        labels = [str(label) for label in labels]
        head += f"Option: {', '.join(labels)} \n"

    def examples(rows: Sequence[tuple[str, str]]) -> list[Example]:
        return [Example(f"{head}{text}\nAnswer:", label) for text, label in rows]

    known = tuple(labels) if labels is not None else tuple(dict.fromkeys(label for _, label in train))
    return Task(name, examples(train), examples(test), known)


def world_tasks(source: Any) -> list[Task]:
    """Returns the tasks of a world whose rows have ``task``, ``text`` and ``label``.

    Args:
        source: A :class:`~modelwright.worlds.task_stream.TaskStreamWorld`, or the folder of one.

    Raises:
        UserError: It is no such world.
    """
    splits = source.splits() if hasattr(source, "splits") else {}
    if not splits:
        folder = Path(source)
        for split in ("train", "test"):
            if not (folder / f"{split}.jsonl").is_file():
                raise UserError(f"{folder} has no {split}.jsonl: make a world with modelwright world task_stream.")
            splits[split] = [record.row for record in Records(folder / f"{split}.jsonl")]
    rows: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for split, records in splits.items():
        for row in records:
            if missing := [key for key in ("task", "text", "label") if key not in row]:
                raise UserError(f"The world's {split} rows have no '{missing[0]}': make one with task_stream.")
            rows.setdefault(str(row["task"]), {"train": [], "test": []})[split].append((row["text"], str(row["label"])))
    tasks = [make_task(name, found["train"], found["test"]) for name, found in rows.items()]
    check_tasks(tasks)
    return tasks


def read_benchmark(
    folder: str | Path, order: str | int | Path | Sequence[str] = "1", instructions: str | Path | None = None
) -> list[Task]:
    """Reads the published files of the 4- and 15-task benchmarks.

    Rows whose label is ``-`` (131 of MNLI's 7,600 test rows) are left out; the official code counts them as wrong.

    Args:
        folder: ``CL_Benchmark`` of the official repository: ``<group>/<task>/{train,test,labels}.json``.
        order: One of :data:`ORDERS`, names of tasks, or a folder of the official configurations such as
            ``configs/order4_configs``.
        instructions: The official ``instruction_config.json``; without it, prompts have no instruction.

    Raises:
        UserError: A task or a file is missing, or is not of this form.
    """
    folder = Path(folder)
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/*/labels.json"))}
    if not found:
        raise UserError(f"{folder} holds no <group>/<task>/labels.json: give the folder CL_Benchmark.")
    texts = _instructions(Path(instructions)) if instructions else {}
    tasks = []
    for name in _order(order):
        if name not in found:
            raise UserError(f"{folder} has no task '{name}': {did_you_mean(name, found)}")
        place = found[name]
        splits = {}
        for split in ("train", "test"):
            if not (place / f"{split}.json").is_file():
                raise UserError(f"Task {name} has no {split} split: {place / f'{split}.json'} does not exist.")
            splits[split] = _published(place / f"{split}.json")
        # COPA's texts hold question and options already, and it has no instruction.
        labels, instruction = read_json(place / "labels.json"), texts.get(place.parent.name)
        if texts and instruction is None:
            examples = {s: [Example(f"{text}\nAnswer:", label) for text, label in rows] for s, rows in splits.items()}
            tasks.append(Task(name, examples["train"], examples["test"], tuple(labels)))
        else:
            tasks.append(make_task(name, splits["train"], splits["test"], labels=labels, instruction=instruction))
    check_tasks(tasks)
    return tasks


def _published(path: Path) -> list[tuple[str, str]]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and {"sentence", "label"} <= r.keys() for r in rows):
        raise UserError(f"{path} should be a JSON list of objects with sentence and label.")
    # "-" says that MNLI's annotators did not agree: nothing can be trained or measured on such a row.
    return [(str(row["sentence"]), str(row["label"])) for row in rows if row["label"] != "-"]


def _instructions(path: Path) -> dict[str, str]:
    raw = read_json(path)
    try:
        return {
            group: next(one["instruction"] for one in listed if one["instruction_type"] == "zero-shot")
            for group, listed in raw.items()
        }
    except (AttributeError, KeyError, StopIteration, TypeError) as error:
        raise UserError(
            f"{path} should map each group of tasks to a list with an instruction of the type zero-shot."
        ) from error


def _order(order: str | int | Path | Sequence[str]) -> Sequence[str]:
    if isinstance(order, int) or (isinstance(order, str) and order in ORDERS):
        if str(order) not in ORDERS:
            raise UserError(f"There is no order {order}: the published ones are {', '.join(ORDERS)}.")
        return ORDERS[str(order)]
    if isinstance(order, str | Path):
        return _official_order(Path(order))
    return [str(name) for name in order]


def _official_order(folder: Path) -> list[str]:
    """A folder for each task, whose list of test tasks has those up to it: their numbers give the order."""
    found = []
    for path in sorted(folder.glob("*/train_tasks.json")):
        train, test = read_json(path), path.with_name("test_tasks.json")
        names = [one["dataset name"] for group in train.values() for one in group]
        seen = sum(len(group) for group in read_json(test).values()) if test.is_file() else 0
        found.append((seen, names))
    if not found:
        raise UserError(
            f"{folder} is neither a published order ({', '.join(ORDERS)}) nor a folder with <task>/train_tasks.json."
        )
    if sorted(seen for seen, _ in found) != list(range(1, len(found) + 1)):
        raise UserError(
            f"{folder}: the test tasks of its configurations do not grow by one, so the order is not known."
        )
    return [name for _, names in sorted(found) for name in names]


def fingerprint(tasks: Sequence[Task]) -> str:
    """Returns a hash (hex) of all rows of all tasks."""
    import hashlib

    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps([task.name, task.labels]).encode())
        for rows in (task.train, task.test):
            for row in rows:
                digest.update(json.dumps([row.prompt, row.answer]).encode())
            digest.update(b"\0")
    return digest.hexdigest()
