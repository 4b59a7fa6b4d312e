import html
import json
import re
from html.parser import HTMLParser

import pytest

from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.report import sections
from modelwright.report.render import render, render_claims
from modelwright.verbs.report import Report
from modelwright.verify.runner import judge, summarise, verdict
from report.make_run import LABELS, METHODS, REPORT, TEXTS, make_run
from verify import toy_claims as toys

VOID = {"meta", "link", "br", "img", "hr", "input"}
SMALL = {"methods": {"zip-fit": 0.74, "random": 0.14}, "architectures": {"llama": 0.0, "resformer-2-1": -0.13}}
EVIL = '"><script>alert(1)</script>&amp;{{ 7 * 7 }}'


class Outline(HTMLParser):
    """Checks that tags nest, and collects what a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.attributes = [], [], [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        self.ids += [v for k, v in attrs if k == "id"]
        self.links += [v for k, v in attrs if k in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)


def words(text):
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL)).split())


def check_page(text):
    """What holds for every report whatever is in it."""
    outline = Outline(text)
    assert not outline.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not any(name.startswith("on") for _, name, _ in outline.attributes)
    pictures = [link for link in outline.links if re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", link)]
    assert len(pictures) == sum(tag == "img" and name == "src" for tag, name, _ in outline.attributes)
    anchors = [link for link in outline.links if link not in pictures]
    assert all(link.startswith("#") for link in anchors)
    assert {link[1:] for link in anchors} <= set(outline.ids)
    text = re.sub(r'src="data:[^"]*"', "", text)
    assert len(outline.ids) == len(set(outline.ids))
    assert not re.search(r"(https?:)?//\w", re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"\b(nan|None|inf)\b", re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL))
    assert {"main", "header", "section"} <= outline.tags
    return outline


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"))
    return folder, render(folder).read_text(encoding="utf-8")


def test_a_whole_report(full):
    _, text = full
    check_page(text)
    said = words(text)
    for piece in (
        "Better data or a better architecture?",
        "Does choosing training data by compression",
        "At equal tokens, ZIP-FIT is better than random text with Llama: 2.",
        "ResFormer (2, 1) improves on Llama by 0.1",
        "all 3 seeds agree",
        "Difference from random text",
        "Difference from Llama",
        "is used for the object is the value",
        "with_stmt ::= 'with'",
        "torch 2.13.0",
        "# at equal tokens",
        "4 min 1 s",
        "60 models trained",
    ):
        assert piece in said, piece
    assert text.count("<svg") == 1 + 4 + 1 + 3 + 1
    assert len(re.findall(r'<li data-mark="●" style="--s: var\(--c1\)">Llama</li>', text)) == 1
    assert text.startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_numbers_in_the_table_are_the_run_s(full):
    folder, text = full
    run = json.loads((folder / "run.json").read_text())
    cell = [
        s["result"]["bits_per_byte"]
        for s in run["steps"]
        if s["step"] == "evaluate" and s["at"]["method"] == "dsir" and s["at"]["architecture"] == "llama"
    ]
    assert len(cell) == 3
    mean = sum(cell) / 3
    sd = (sum((x - mean) ** 2 for x in cell) / 2) ** 0.5
    assert f"<td>{mean:.3f} ± {sd:.3f}</td>" in text


def test_drawing_again_gives_the_same_bytes(full, tmp_path):
    folder, text = full
    assert render(folder, tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_it_reads_nothing_but_the_run(full, tmp_path):
    folder, text = full
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        assert render(moved, tmp_path / "again.html").read_text(encoding="utf-8") == text
    finally:
        moved.rename(folder)


def test_every_string_is_escaped(tmp_path):
    report = json.loads(json.dumps(REPORT))
    report["question"] = report["compare"][0]["title"] = report["compare"][0]["unit"] = report["compare"][0][
        "given"
    ] = EVIL
    report["curves"][0]["title"] = report["curves"][0]["unit"] = EVIL
    report["labels"] = {key: f"{key}{EVIL}" for key in (*LABELS, "\0")}
    folder = make_run(
        tmp_path / "run", report=report, title=EVIL, texts={k: EVIL + v for k, v in TEXTS.items()}, **SMALL
    )
    run = json.loads((folder / "run.json").read_text())
    run |= {"name": EVIL, "recipe_text": EVIL, "started": EVIL, "machine": {EVIL: EVIL}, "versions": {EVIL: EVIL}}
    for step in run["steps"]:
        step["verb"] = EVIL
        if step["step"] in ("world", "write"):
            step["step"] = step["step"] + EVIL
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "steps" / "write-zip-fit-resformer-2-1" / "completions.jsonl").write_text(
        json.dumps({"prompt": EVIL, "completion": EVIL})
    )
    text = render(folder).read_text(encoding="utf-8")
    check_page(text)
    assert "<script" not in text
    assert text.count("alert(1)") == text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 30
    assert text.count("7 * 7") == text.count("&amp;amp;{{ 7 * 7 }}") > 30
    # The same without a report block, where tables name everything.
    run["report"] = {}
    for step in run["steps"]:
        step["at"] = {f"{k}{EVIL}": f"{v}{EVIL}" for k, v in step["at"].items()}
        step["result"] = {f"{k}{EVIL}": f"{json.dumps(v)}{EVIL}" for k, v in step["result"].items()}
    (folder / "run.json").write_text(json.dumps(run))
    text = render(folder).read_text(encoding="utf-8")
    check_page(text)
    assert "<script" not in text


def test_dollars_and_surrogates_do_not_break_it(tmp_path):
    report = {**REPORT, "labels": {"zip-fit": "$\\frac{$", "llama": "a_b^c $x$"}}
    folder = make_run(
        tmp_path / "run", report=report, texts=dict.fromkeys(TEXTS, "\ud800 lone \x00 zero \x1b[0m"), **SMALL
    )
    check_page(render(folder).read_text(encoding="utf-8"))


def test_an_unfinished_run(tmp_path):
    folder = make_run(tmp_path / "run", finished=False, **SMALL)
    text = render(folder).read_text(encoding="utf-8")
    check_page(text)
    assert "The run is not finished (it was stopped): 8 of" in words(text)
    assert "over 2 seeds" in words(text)


def test_a_run_that_has_hardly_begun(tmp_path):
    folder = make_run(tmp_path / "run", **SMALL)
    run = json.loads((folder / "run.json").read_text())
    for keep in (2, 1, 0):
        run["steps"] = run["steps"][:keep]
        run["planned"] = 12
        (folder / "run.json").write_text(json.dumps({k: v for k, v in run.items() if k not in ("seconds", "machine")}))
        text = render(folder).read_text(encoding="utf-8")
        check_page(text)
        assert "No step 'evaluate' has finished" in html.unescape(text)


def test_results_may_stand_beside_the_run(tmp_path):
    folder = make_run(tmp_path / "run", **SMALL)
    expected = render(folder).read_text(encoding="utf-8")
    run = json.loads((folder / "run.json").read_text())
    for step in run["steps"]:
        del step["result"]
    (folder / "run.json").write_text(json.dumps(run))
    assert render(folder).read_text(encoding="utf-8") == expected


def test_one_seed_says_so(tmp_path):
    text = render(make_run(tmp_path / "run", seeds=(0,), **SMALL)).read_text(encoding="utf-8")
    check_page(text)
    assert "cannot be told from chance" in words(text)
    assert "±" not in re.search(r'<section class="answer".*?</section>', text, re.DOTALL)[0]


def test_no_effect_is_reported_as_none(tmp_path):
    folder = make_run(tmp_path / "run", effect=0.0, noise=0.05, **SMALL)
    said = words(render(folder).read_text(encoding="utf-8"))
    assert "no difference from random text can be seen" in said
    assert "improves on" not in said


def test_without_a_report_block_all_numbers_are_listed(tmp_path):
    folder = make_run(tmp_path / "run", report={}, **SMALL)
    text = render(folder).read_text(encoding="utf-8")
    check_page(text)
    assert '<section class="answer"' not in text
    for piece in ("bits per byte", "tokens per second", "zip-fit", "evaluate perplexity"):
        assert piece in words(text)


def test_a_bad_report_block_costs_only_itself(tmp_path):
    report = {**REPORT, "compare": [{**REPORT["compare"][0], "rows": "nothing"}]}
    said = words(render(make_run(tmp_path / "a", report=report, **SMALL)).read_text(encoding="utf-8"))
    assert "has no dimension 'nothing'" in said
    assert "What was chosen, and why" in said
    said = words(render(make_run(tmp_path / "b", report={"colour": "red"}, **SMALL)).read_text(encoding="utf-8"))
    assert "could not be read" in said
    assert "report.colour" in said


def test_torn_and_missing_files(tmp_path):
    folder = make_run(tmp_path / "run", **SMALL)
    for log in folder.rglob("training_log.jsonl"):
        log.write_bytes(log.read_bytes()[:-30] + b'\n{"tokens": 9e5, "loss": NaN}\n')
    for chosen in folder.rglob("chosen.jsonl"):
        chosen.unlink()
    text = render(folder).read_text(encoding="utf-8")
    check_page(text)
    assert "Training loss" in text
    for log in folder.rglob("training_log.jsonl"):
        log.unlink()
    assert "no finished 'train' step has 'tokens' and 'loss'" in words(render(folder).read_text(encoding="utf-8"))


def test_the_pool_and_the_line_are_shown(full):
    said = words(full[1])
    assert "(the whole pool): language reference 10%" in said
    assert re.search(r"the last that it took: Rank 299 · score 0\.\d{4} · (code|docstring|tests) \(not wanted\)", said)
    assert "Shared with held-out counts" in said


def test_the_home_folder_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert sections._without_paths("pool: /home/someone/data.jsonl") == "pool: ~/data.jsonl"
    assert sections._without_paths("pool: /home/someoneelse/x") == "pool: /home/someoneelse/x"


def test_more_methods_than_colours(tmp_path):
    methods = {f"method-{i}": i / 12 for i in range(11)} | {"random": 0.14}
    folder = make_run(tmp_path / "run", methods=methods, architectures={"llama": 0.0}, seeds=(0, 1))
    check_page(render(folder).read_text(encoding="utf-8"))
    assert len(METHODS) < 8


def test_what_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no run\.json"):
        render(tmp_path)
    for content, message in (("[]", "not the record of a run"), ("{", "not valid JSON"), ('{"format": 7}', "format 7")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=message):
            render(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json"]


@pytest.fixture
def results_folder(tmp_path):
    values = {
        str(s): {"ours": {"loss": 1.0 + s / 50}, "plain": {"loss": 1.5 + s / 40}, "strong": {"loss": None}}
        for s in range(3)
    }
    claim = toys.IN_PART
    document = {
        "format": 1, "method": "toy", "statement": EVIL, "paper": EVIL, "notes": EVIL, "scale": "cpu",
        "seeds": [0, 1, 2], "metrics": {"loss": {"name": EVIL, "unit": "", "better": "lower", "digits": 3}},
        "variants": dict(claim.variants), "prepared": {"rate": EVIL}, "measurements": values,
        "seconds": 65.0, "cpu_seconds": 120.0, "workers": 2,
        "versions": {"python": "3.11"}, "machine": {"processor": "x", "cores": 2}, "date": "2025-11-21",
    }  # fmt: skip
    document["summary"] = summarise(document)
    document["bars"] = [judge(bar, claim, values) for bar in claim.bars]
    document["verdict"] = verdict(document["bars"])
    (tmp_path / "results" / "claims").mkdir(parents=True)
    (tmp_path / "results" / "claims" / "toy.cpu.json").write_text(json.dumps(document))
    return tmp_path / "results"


def test_a_page_of_claims(results_folder):
    text = render_claims(results_folder).read_text(encoding="utf-8")
    check_page(text)
    said = words(text)
    # The words of the text page (verify.view), which this page shows.
    missing = "no finite value on 3 of 3 seeds"
    for piece in ("holds in part", f"({missing})", f"; {missing}", "1 min 5 s", "not met"):
        assert piece in said
    assert "<script" not in text


def test_the_verb(results_folder, tmp_path):
    folder = make_run(tmp_path / "run", **SMALL)
    result = Report(directory=folder).run(Silent())
    assert result["output"] == str(folder / "report.html")
    assert result["bytes"] == (folder / "report.html").stat().st_size
    Report(directory=folder).run(Silent())
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        Report(directory=folder, output=tmp_path / "mine.html").run(Silent())
    assert (tmp_path / "mine.html").read_text() == "mine"
    Report(directory=folder, output=tmp_path / "mine.html", force=True).run(Silent())
    assert "Better data" in (tmp_path / "mine.html").read_text(encoding="utf-8")
    claims = Report(directory=results_folder).run(Silent())
    assert "What was claimed" in (results_folder / "report.html").read_text(encoding="utf-8")
    assert claims["output"].endswith("report.html")
    with pytest.raises(UserError, match="is not a folder"):
        Report(directory=tmp_path / "nowhere").run(Silent())
    (tmp_path / "empty" / "claims").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no claim result"):
        Report(directory=tmp_path / "empty").run(Silent())
