import xml.etree.ElementTree as ElementTree

from modelwright.report.continual import heat_map, render_continual, write_heat_map

RESULT = {
    "accuracy": 0.55, "learning_accuracy": 0.9, "forgetting": 0.35, "backward_transfer": -0.7,
    "matrix": {"tasks": ["old <task>", "new"], "rows": [[0.95, 0.1], [0.25, 0.85]]},
    "overlap": {"mean": [[0.9, 0.3], [0.4, 0.8]], "layers": {}, "samples": 40},
    "steps_by_task": [10, 12], "seconds_by_task": [1.0, 2.0], "rows": {}, "model": {"name": "m"}, "with": None,
    "settings": {"tuning": "full"}, "software": {}, "machine": {},
}  # fmt: skip


def test_the_page_says_what_was_forgotten(tmp_path):
    page = render_continual(RESULT, tmp_path / "r.html", title="Two & more").read_text()
    assert "old &lt;task&gt; was forgotten most, from 95.0% at its best to 25.0%" in page
    assert "Two &amp; more" in page
    assert "-70.0" in page
    assert page.count("<svg") == 2
    kept = {
        **RESULT,
        "matrix": {"tasks": ["a"], "rows": [[1.0]]},
        "overlap": {"mean": [[1.0]], "layers": {}, "samples": 1},
    }
    assert "no task was forgotten" in render_continual(kept, tmp_path / "k.html", title="t").read_text()
    never = {**kept, "accuracy": 0.0, "matrix": {"tasks": ["a"], "rows": [[0.0]]}}
    assert "it learned none of them" in render_continual(never, tmp_path / "n.html", title="t").read_text()


def test_heat_maps_hold_every_number(tmp_path):
    svg = heat_map("m", "alt", ["a", "b"], ["c", "d", "e"], [[0, 0.25, 1], [0.5, 0.75, 0.125]], "on", "after")
    texts = ["".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter() if e.tag == "text"]
    assert {"0", "25", "100", "50", "75", "12", "a", "e", "on", "after"} <= set(texts)
    write_heat_map(tmp_path / "m.png", "Accuracy", ["a"], ["c"], [[0.5]], "on", "after")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
