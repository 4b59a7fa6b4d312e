"""The answers that the benchmark's authors published, item by item, as rows that our scorer reads.

Their repository has ``results/hallu_edit/<model>/<topic>_<METHOD>.json`` for efficacy, generalisation and locality,
``hallu_edit_multi_hop`` for portability and ``hallu_edit_multi_turn/<model>_multi_turn/…_yes.json`` for robustness.
Each was a run of its own, and the items are not quite the same, so the three are read side by side and never joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelwright.errors import UserError, did_you_mean
from modelwright.evaluation.hallueditbench.items import HOPS
from modelwright.files import read_json

_FOLDERS = ("hallu_edit", "hallu_edit_multi_hop", "hallu_edit_multi_turn")
#: Our name, their section and prefix, and the kind of answer.
_SECTIONS = (
    ("yes", "yes_questions", "yes", "yes_no"),
    ("no", "no_questions", "no", "yes_no"),
    ("multiple_choice", "multiple_choice_questions", "multiple_choice", "letter"),
    ("reversed", "reversed_relation_questions", "reversed_relation", "text"),
)


def published_models(folder: str | Path) -> list[str]:
    """Returns the models whose answers a copy of their ``results`` folder holds.

    Raises:
        UserError: It is no such folder.
    """
    root = Path(folder) / _FOLDERS[0]
    if not root.is_dir():
        raise UserError(
            f"{folder} holds no folder '{_FOLDERS[0]}': give the folder 'results' of HalluEditBench's repository."
        )
    return sorted(p.name for p in root.iterdir() if p.is_dir())


def published_rows(folder: str | Path, model: str) -> Iterator[dict[str, Any]]:
    """Yields the published answers of a model as rows; see :mod:`~modelwright.evaluation.hallueditbench.scores`.

    Args:
        folder: Their folder ``results``.
        model: One of :func:`published_models`.

    Raises:
        UserError: No such model, or a file is not as they wrote it.
    """
    known = published_models(folder)
    if model not in known:
        raise UserError(f"{folder} has no answers of '{model}': {did_you_mean(model, known)}")
    for kind, ending in zip(_FOLDERS, ("", "", "_yes")):
        place = Path(folder) / kind / (model + ("_multi_turn" if ending else ""))
        for path in sorted(place.glob(f"*{ending}.json")):
            topic, _, method = path.stem.removesuffix(ending).rpartition("_")
            rows, number = read_json(path), 0
            try:
                for number, row in enumerate(rows):
                    yield {
                        "method": method,
                        "topic": topic,
                        "item": f"{topic}-{row['requested_edit']['prompt']}-{number}",
                        "seconds": float(row["time"]) if kind == _FOLDERS[0] else None,
                        **_READ[kind](row),
                    }
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{path} is not as the benchmark writes it: {error!r} at item {number}.") from error


def _probe(
    name: str, label: str | None, kind: str, row: Mapping[str, Any], section: str | None, key: str
) -> dict[str, Any]:
    pre, post = (row[side][section] if section else row[side] for side in ("pre", "post"))
    return {
        "name": name, "label": label, "kind": kind,
        "pre": pre[f"{key}_output"][0] or "", "post": post[f"{key}_output"][0] or "",
        "pre_right": pre.get(f"{key}_acc", [None])[0], "post_right": post[f"{key}_acc"][0],
    }  # fmt: skip


def _edit(row: Mapping[str, Any]) -> dict[str, Any]:
    edit = row["requested_edit"]
    probes = [
        _probe("efficacy", edit["target_new"], "text", row, None, "edit"),
        _probe("rephrase", edit["target_new"], "text", row, None, "rephrase"),
        *(
            _probe(name, edit[section][key]["ground_truth"], kind, row, section, key)
            for name, section, key, kind in _SECTIONS
        ),
        _probe("locality", None, "text", row, "locality", "locality"),
    ]
    return {"probes": probes}


def _hops(row: Mapping[str, Any]) -> dict[str, Any]:
    probes = []
    for n in HOPS:
        section = f"questions_{n}hop"
        label = row["requested_edit"][section][f"{n}hop"]["ground_truth"]
        probes.append(_probe(f"{n}hop", str(label), "text", row, section, f"{n}hop"))
    return {"probes": probes}


def _turns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"probes": [], "turns": {"yes": [bool(right) for right in row["post"]["edit_acc_multi_turn"]]}}


_READ = dict(zip(_FOLDERS, (_edit, _hops, _turns)))
