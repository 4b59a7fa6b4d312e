"""`modelwright select` as a verb and as a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forked import modelwright
from modelwright.data import Records, read_texts, write_rows
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer
from modelwright.progress import Silent
from modelwright.verbs.select import Select

CATS = [f"my cat sleeps on mat number {i}" for i in range(10)]
STOCKS = [f"stocks fell by {i} points today" for i in range(30)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": t, "kind": "cat"} for t in CATS] + [{"text": t, "kind": "stock"} for t in STOCKS]
    write_rows("pool.jsonl", rows)
    write_rows("target.csv", [{"example": "the cat sat on the mat"}, {"example": "a cat sleeps"}, {"example": " "}])
    write_rows("heldout.jsonl", [{"text": CATS[3]}])


def select(method: str = "tfidf", **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"pool": ["pool.jsonl"], "target": ["target.csv"], "target_field": "example"} | options
    result = Select(method=method, **given).run(Silent())
    return json.loads(json.dumps(result, allow_nan=False))


def test_a_whole_selection() -> None:
    result = select(
        top=10, group_field="kind", target_group=["cat"], report=Path("report.json"), options={"similarity": "max"}
    )
    assert sorted(read_texts("chosen.jsonl")) == CATS
    assert result["precision"] == result["recall"] == 1.0
    assert result["groups"] == {"cat": 10}
    assert result["documents"] == 10
    assert result["pool_documents"] == 40
    assert result["target_documents"] == 2  # the blank one is left out
    assert result["bytes"] == sum(len(t) for t in CATS)
    assert result["options"]["similarity"] == "max"
    assert result["tokens"] is None
    rows = [r.row for r in Records("chosen.jsonl")]
    assert [r["rank"] for r in rows] == list(range(1, 11))
    assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert {k: v for k, v in report.items() if k not in ("versions", "machine")} == result
    assert "numpy" in report["versions"]


def test_a_token_budget() -> None:
    byte_tokenizer().save_pretrained("tokenizer")
    result = select(token_budget=100, tokenizer="tokenizer")
    assert result["tokens"] == sum(len(t) for t in read_texts("chosen.jsonl")) <= 100


def test_the_seed_reaches_methods_that_draw_and_no_others() -> None:
    chosen = []
    for seed in (0, 0, 1):
        select("random", top=5, seed=seed, output=Path(f"{len(chosen)}.jsonl"))
        chosen.append(read_texts(f"{len(chosen)}.jsonl"))
    assert chosen[0] == chosen[1] != chosen[2]
    select("tfidf", top=5, seed=1)


def test_methods_without_a_target() -> None:
    select("all", target=[])
    assert read_texts("chosen.jsonl") == CATS + STOCKS
    result = select("random", target=[], top=3, output=Path("b.jsonl"), workers=0)
    assert result["target_documents"] == 0


def test_scores_do_not_stay_without_the_chosen_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelwright.curation import stream

    def full(path: Path, *rest: Any) -> None:
        if Path(path).name == "chosen.jsonl":
            raise UserError("full")
        write_rows(path, *rest)

    monkeypatch.setattr(stream, "write_rows", full)
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match="full"):
        Select(method="random", pool=["pool.jsonl"], top=3, scores=Path("scores.jsonl")).run(Silent())
    assert sorted(Path().iterdir()) == before


def test_contamination() -> None:
    result = select(top=10, heldout=["heldout.jsonl"], ngram=7)
    assert result["contamination"]["contaminated_documents"] == 1
    select(top=9, heldout=["heldout.jsonl"], ngram=7, drop_contaminated=True, output=Path("b.jsonl"))
    assert CATS[3] not in read_texts("b.jsonl")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tfdf", {"top": 1}, "no 'tfdf' among the selectors: did you mean 'tfidf'"),
        ("tfidf", {}, "not said how much to keep"),
        ("tfidf", {"top": 0}, "top must be at least 1"),
        ("tfidf", {"top": 41}, "top is 41, but the pool has only 40 documents"),
        ("tfidf", {"top": 1, "target": []}, r"tfidf needs examples of what is wanted: give them \(--target\)"),
        ("tfidf", {"top": 1, "target_field": "text"}, r"target.csv:2 has no field 'text' \(fields: example\)"),
        ("tfidf", {"top": 1, "text_field": "txt"}, r"pool.jsonl:1 has no field 'txt' \(fields: text, kind\)"),
        ("tfidf", {"top": 1, "options": {"simlarity": "max"}}, "no option 'simlarity': did you mean 'similarity'"),
        ("tfidf", {"top": 1, "pool": ["-"], "target": ["-"]}, "can be read for one option only"),
        ("tfidf", {"top": 1, "target_group": ["cat"]}, "--target-group needs --group-field"),
        ("tfidf", {"token_budget": 9}, r"needs a tokenizer.*--tokenizer"),
        ("tfidf", {"token_budget": 9, "tokenizer": "nowhere"}, "nowhere"),
        ("tfidf", {"top": 1, "pool": ["nowhere.jsonl"]}, "nowhere.jsonl does not exist"),
        ("tfidf", {"top": 1, "target": ["empty.jsonl"]}, "empty.jsonl holds no documents"),
        ("tfidf", {"top": 1, "pool": ["empty.jsonl"]}, "empty.jsonl holds no documents"),
        ("tfidf", {"top": 1, "target": ["blank.jsonl"], "target_field": None}, "All 1 target documents are blank"),
        ("tfidf", {"top": 1, "output": Path("pool.jsonl"), "force": True}, "both pool and output"),
        ("tfidf", {"top": 1, "output": Path("target.csv")}, "target.csv exists already"),
        ("tfidf", {"top": 1, "report": Path("target.csv")}, "target.csv exists already"),
        ("tfidf", {"top": 1, "output": Path("chosen.doc")}, "cannot be written by its suffix"),
        ("tfidf", {"top": 1, "ngram": 0}, "--ngram must be at least 1"),
        ("tfidf", {"top": 1, "workers": -1}, "--workers must be 0"),
        ("d4", {"top": 1}, "An encoder is needed"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(method: str, options: dict[str, Any], message: str) -> None:
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    before = {p.name for p in Path().iterdir()}
    with pytest.raises(UserError, match=message) as caught:
        select(method, **options)
    assert "\n" not in str(caught.value)
    assert {p.name for p in Path().iterdir()} == before


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", "from modelwright.cli import main; main()", "select", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_command_gives_exit_codes() -> None:
    fine = modelwright("select", "random", "--pool", "pool.jsonl", "--top", "3", "--json")
    assert fine.returncode == 0, fine.stderr
    assert json.loads(fine.stdout)["documents"] == 3
    wrong = modelwright("select", "random", "--pool", "pool.jsonl", "--top", "3")
    assert wrong.returncode == 2
    said = "chosen.jsonl exists already: choose another output, or give --force to replace it."
    assert wrong.stderr.strip().endswith(said)
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_leaves_nothing(sent: signal.Signals, code: int) -> None:
    running = command("random", "--pool", "-", "--top", "3", stdin=subprocess.PIPE)
    # More than a pipe holds: when all is written, the command is reading.
    running.stdin.write('{"text": "x"}\n' * 20_000)
    running.stdin.flush()
    os.kill(running.pid, sent)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code, errors
    assert "Traceback" not in errors
    assert {p.name for p in Path().iterdir()} == {"pool.jsonl", "target.csv", "heldout.jsonl"}
