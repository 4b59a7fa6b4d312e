import re
import xml.etree.ElementTree as ElementTree

import pytest

from modelwright.report import figures

NASTY = '<script>alert(1)</script> & "$x^2$" _^{ \\frac \u2028 é 漢'
UNPRINTABLE = "a\x00\x1b\ud800\uffffb"


def drawn():
    line = figures.Line(NASTY, [1, 2000, 3_000_000], [3.0, 2.0, 1.5], [2.9, 1.9, 1.4], [3.1, 2.1, 1.6], 9)
    return {
        "curves": figures.curves("f-0", NASTY, [line], NASTY, NASTY, (1, 4)),
        "dots": figures.dots(
            "f-1", NASTY, [NASTY, "b"],
            [figures.Dots(0, 0, 0, [1.0, 2.0], 1.5, 0.7), figures.Dots(1, 0, 0, [1.0], 1.0, None)], 1, NASTY,
        ),
        "stacked": figures.stacked("f-2", NASTY, [NASTY, "b"], [(0, [60, 100]), (11, [40, 0])], NASTY),
        "bars": figures.bars("f-3", NASTY, [NASTY], [0.0], [NASTY], NASTY),
        "histogram": figures.histogram("f-4", NASTY, {0: [0.1, 0.2, 0.2], 3: [0.3]}, NASTY),
    }  # fmt: skip


@pytest.fixture(scope="module")
def plots():
    return drawn()


def test_plots_are_valid_and_self_contained(plots):
    for svg in plots.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg"
        assert root.get("role") == "img"
        assert root.find("title").text == NASTY
        assert root.find("title").get("id") == root.get("aria-labelledby")
        assert not {e.tag for e in root.iter()} & {"script", "image", "metadata", "foreignObject"}
        assert "http" not in svg
        assert "xmlns" not in svg


def test_text_stays_text(plots):
    for name, svg in plots.items():
        texts = ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("text")]
        assert any(t.strip() == NASTY for t in texts), name
        assert "font-family" not in svg
        assert "DejaVu" not in svg


def test_colours_are_the_page_s(plots):
    for svg in plots.values():
        assert "#0102" not in svg
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= {"ink", "rule", "paper", *(f"c{i}" for i in range(1, 9))}
        assert "var(--c1)" in svg or "var(--c2)" in svg
        # Whatever colour matplotlib chose by itself would not follow the page into the dark.
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#ffffff"}
        assert "#ffffff" not in re.sub(r"<clipPath.*?</clipPath>", "", svg, flags=re.DOTALL)


def test_ids_are_unique_and_references_resolve(plots):
    everything = "".join(plots.values())
    ids = re.findall(r'\bid="([^"]+)"', everything)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', everything) + re.findall(r"url\(#([^)]+)\)", everything)
    assert references
    assert set(references) <= set(ids)


def test_plots_are_deterministic(plots):
    assert drawn() == plots


def test_no_state_is_left_behind():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.bars("a", "a", ["a"], [1.0], ["a"], "a")
    assert dict(matplotlib.rcParams) == before


def test_unprintable_text_is_replaced():
    svg = figures.bars("a", UNPRINTABLE, [UNPRINTABLE, "long " * 100], [1.0, 2.0], [UNPRINTABLE] * 2, UNPRINTABLE)
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("text")]
    assert texts.count("a\ufffd\ufffd\ufffd\ufffdb") == 4
    assert max(map(len, texts)) <= 40
