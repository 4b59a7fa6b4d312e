import json
import re
from pathlib import Path

import pytest

from modelwright.progress import Silent
from modelwright.verify import page
from modelwright.verify.runner import run_claim
from verify import toy_claims as toys

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    document = run_claim(toys.IN_PART, "cpu", [0, 1, 2], 2, Silent(), cache=root / "cache")
    (root / "results" / "claims").mkdir(parents=True)
    (root / "results" / "claims" / "toy.cpu.json").write_text(json.dumps(document))
    (root / "results" / "benchmarks").mkdir()
    (root / "results" / "benchmarks" / "speed.json").write_text(
        json.dumps({"title": "Speed | of <toys>", "rows": [{"peer": "us_1", "ratio": 2.5, "pairs": 120000}]})
    )
    (root / "docs" / "methods").mkdir(parents=True)
    (root / "docs" / "methods" / "toy.md").write_text("# Toy\n<!-- claims: toy -->\nold\n<!-- /claims -->\nEnd.\n")
    (root / "docs" / "methods" / "none.md").write_text("<!-- claims: nobody -->\n<!-- /claims -->\n")
    (root / "docs" / "methods" / "plain.md").write_text("No markers.\n")
    return root, document


def test_pages_are_drawn_once(checkout):
    root, _ = checkout
    assert {p.name for p in page.main(root)} == {"claims.md", "benchmarks.md", "toy.md", "none.md"}
    assert page.main(root) == []
    toy = (root / "docs" / "methods" / "toy.md").read_text()
    assert toy.startswith("# Toy\n<!-- claims: toy -->\n")
    assert toy.endswith("<!-- /claims -->\nEnd.\n")
    assert "\nold\n" not in toy
    assert "holds in part" in toy
    assert "Not measured yet" in (root / "docs" / "methods" / "none.md").read_text()


def test_claims_page_says_what_was_measured(checkout):
    root, document = checkout
    text = page.claims_page(root / "results")
    mean = f"{document['summary']['plain']['loss']['mean']:.3f} ± {document['summary']['plain']['loss']['sd']:.3f}"
    for piece in (mean, "holds in part", "0.3 lower (Toy, 2024).", "**met**", "**not met**", "3 seeds"):
        assert piece in text
    assert "<plain>" not in text
    assert "&lt;plain&gt; &amp; simple" in text
    assert "nan" not in re.findall(r"\w+", text)
    # Every row of a table has as many cells as its header.
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_benchmarks_page(checkout):
    text = page.benchmarks_page(checkout[0] / "results")
    assert "## Speed \\| of &lt;toys&gt;" in text
    assert "| us\\_1 | 2.5 | 120,000 |" in text


def test_empty_results(tmp_path):
    assert "No claim" in page.claims_page(tmp_path)
    assert "No benchmark" in page.benchmarks_page(tmp_path)


def test_the_committed_pages_are_up_to_date():
    stale = [
        str(p.relative_to(CHECKOUT)) for p, t in page.pages(CHECKOUT).items() if not p.exists() or p.read_text() != t
    ]
    assert not stale, f"run `python -m modelwright.verify.page` and commit {stale}"
