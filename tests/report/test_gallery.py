import base64
import html
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modelwright.progress import Silent
from modelwright.report.render import render
from modelwright.verbs.world import World
from report.test_render import EVIL, check_page, words

COLOURS = {"clean": (0, 128, 0), "mismatched": (200, 0, 0)}
CHOSEN = {"step": "select", "title": "What each method took", "rows": "method", "target": "clean", "pictures": 2}


def png(colour, size=(16, 12), mode="RGB", kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(stream, kind)
    return stream.getvalue()


def chosen(n=9, **more):
    """Rows in random order, ranked from 1; odd ranks are clean."""
    rows = []
    for i in range(n):
        rank = (i * 4) % n + 1
        kind = "clean" if rank % 2 else "mismatched"
        rows.append(
            {
                "image": {"bytes": png(COLOURS[kind]), "path": None},
                "caption": f"caption {rank}",
                "kind": kind,
                "rank": rank,
                "score": 10.0 - rank,
                **more,
            }
        )
    return rows


def make(folder, files, gallery):
    """Makes a run whose steps `select` wrote the files: (method, seed) to rows or bytes."""
    steps = []
    for (method, seed), rows in files.items():
        place = folder / "steps" / f"{method}-{seed}"
        place.mkdir(parents=True)
        if isinstance(rows, bytes):
            (place / "chosen.parquet").write_bytes(rows)
        elif rows is not None:
            pq.write_table(pa.Table.from_pylist(rows), place / "chosen.parquet", row_group_size=4)
        steps.append({
            "id": place.name, "step": "select", "verb": "select jest", "at": {"method": method, "seed": seed},
            "folder": f"steps/{place.name}", "seconds": 1.0, "result": {"pairs": 3},
        })  # fmt: skip
    report = {"gallery": gallery, "labels": {"jest": "JEST"}}
    (folder / "run.json").write_text(json.dumps({"name": "mine", "steps": steps, "report": report}))
    text = render(folder).read_text(encoding="utf-8")
    check_page(text)
    return text


def shown(text):
    """Returns (heading, [(colour of the middle, caption), ...]) of every strip."""
    found = []
    for heading, body in re.findall(r"<h4>([^<]*)</h4>\s*<div class=\"gallery\">(.*?)</div>", text, re.DOTALL):
        pictures = []
        for source, caption in re.findall(
            r'src="data:image/png;base64,([^"]*)".*?<figcaption>([^<]*)', body, re.DOTALL
        ):
            picture = Image.open(io.BytesIO(base64.b64decode(source)))
            pictures.append((picture.getpixel((picture.width // 2, picture.height // 2)), html.unescape(caption)))
        found.append((html.unescape(heading), pictures))
    return found


def test_first_and_last_of_every_method(tmp_path):
    other = [{**row, "caption": "the other's " + row["caption"]} for row in chosen(3)]
    text = make(tmp_path, {("jest", 0): chosen(), ("jest", 1): chosen(1), ("uniform", 0): other}, [CHOSEN])
    good, bad = COLOURS["clean"], COLOURS["mismatched"]
    assert shown(text) == [
        ("JEST: the first", [(good, "caption 1"), (bad, "caption 2")]),
        ("JEST: the last", [(bad, "caption 8"), (good, "caption 9")]),
        ("uniform: the first", [(good, "the other's caption 1"), (bad, "the other's caption 2")]),
        ("uniform: the last", [(good, "the other's caption 3")]),
    ]
    assert "What each method took" in words(text)
    assert re.search(r'<small class="better">clean · score 9</small>', text)
    assert re.search(r'<small class="worse">mismatched · score 8</small>', text)
    assert '<a href="#pictures">' in text


def test_some_of_each_kind_where_nothing_is_ranked(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "rank"} for row in chosen()]
    text = make(tmp_path, {("jest", 0): rows}, [{**CHOSEN, "target": []}])
    assert [(heading, len(pictures)) for heading, pictures in shown(text)] == [
        ("JEST: clean", 2), ("JEST: mismatched", 2),
    ]  # fmt: skip
    assert all(len({colour for colour, _ in pictures}) == 1 for _, pictures in shown(text))
    # The heading names the kind, so the pictures need not.
    assert re.findall("<small[^>]*>([^<]*)</small>", text) == [f"score {10 - rank}" for rank in (1, 5, 4, 8)]


def test_a_world_is_shown_by_its_kinds(tmp_path):
    World(name="pictures", output=tmp_path / "steps" / "w", set={"pool_size": 40, "max_objects": 1}).run(Silent())
    step = {"id": "w", "step": "world", "verb": "world", "at": {}, "folder": "steps/w", "seconds": 1.0, "result": {}}
    report = {"gallery": [{"step": "world", "file": "train.parquet", "pictures": 3}]}
    (tmp_path / "run.json").write_text(json.dumps({"name": "mine", "steps": [step], "report": report}))
    text = render(tmp_path).read_text(encoding="utf-8")
    check_page(text)
    assert {heading: len(pictures) for heading, pictures in shown(text)} == dict.fromkeys(
        ("clean", "mismatched", "noisy", "easy", "duplicate"), 3
    )


def test_only_pixels_reach_the_page(tmp_path):
    images = [
        png((9, 9, 9), (400, 200), "L"), png((9, 9, 9), kind="GIF"), b"<svg onload=alert(1)>", b"", png((1, 2, 3))[:40],
    ]  # fmt: skip
    rows = [{"image": data, "caption": EVIL, "kind": EVIL, "rank": i} for i, data in enumerate([*images, None])]
    text = make(tmp_path, {("jest", 0): rows}, [{**CHOSEN, "pictures": 6, "title": EVIL}])
    assert "<script" not in text
    assert text.count("alert(1)") == text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 6
    sources = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert [Image.open(io.BytesIO(base64.b64decode(s))).size for s in sources] == [(112, 56), (16, 12)]
    assert text.count("This picture cannot be read.") == 4


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        ({("jest", 0): None}, {}, "no finished 'select' step wrote chosen.parquet"),
        ({("jest", 0): chosen()}, {"step": "train"}, "No step 'train' has finished"),
        ({("jest", 0): chosen()}, {"text": "text"}, "chosen.parquet has no column 'text'"),
        ({("jest", 0): b"PAR1 torn"}, {}, "chosen.parquet cannot be read"),
        ({("jest", 0): chosen()}, {"pictures": 0}, "report.gallery.0.pictures"),
    ],
)
def test_what_cannot_be_shown_costs_only_itself(files, more, message, tmp_path):
    assert message in words(make(tmp_path, files, [{**CHOSEN, **more}]))


def test_rows_without_kind_rank_and_score(tmp_path):
    rows = [{"image": png((5, 5, 5)), "caption": str(i)} for i in range(5)]
    text = make(tmp_path, {("jest", 0): rows}, [{"step": "select", "pictures": 3, "target": "clean"}])
    assert text.count("<img") == 3
    odd = [{**row, "score": float("nan"), "rank": None, "kind": None} for row in rows]
    text = make(tmp_path / "odd", {("jest", 0): odd}, [{**CHOSEN, "pictures": 3}])
    assert text.count("<img") == 0
