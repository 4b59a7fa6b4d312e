import textwrap
from pathlib import Path

import pytest

from modelwright import catalog
from modelwright.errors import UserError

CARDS = list(catalog.cards().values())
DOCS = Path(catalog.__file__).parents[2] / "docs"


def test_there_are_methods():
    assert {"zip-fit", "dsir", "resformer"} <= {card.name for card in CARDS}


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
def test_a_card_is_complete_and_everything_it_names_exists(card):
    assert card.summary
    assert card.what_for
    assert card.when_not
    assert card.name == card.name.lower()
    for kind, parts in card.provides.items():
        for name, target in parts.items():
            if kind == "model_types":
                __import__(target)
            else:
                assert catalog.load(kind, name) is not None


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
def test_a_method_has_a_page_and_tests_under_its_own_name(card):
    assert (DOCS / "methods" / f"{card.name}.md").is_file()
    assert any((DOCS.parent / "tests" / card.stage / card.folder.name).glob("test_*.py"))


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
def test_a_cards_example_runs(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(textwrap.dedent(card.python), f"card of {card.name}", "exec"), {"__name__": "example"})


def test_names_are_forgiving_and_errors_suggest():
    assert catalog.find("ZIP_FIT").name == "zip-fit"
    assert catalog.find("svformer").name == "resformer"
    with pytest.raises(UserError, match="did you mean .*'zip-fit'"):
        catalog.find("zipfitt")
    with pytest.raises(UserError, match="did you mean 'dsir'"):
        catalog.load("selectors", "dsirr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not a valid method card"),
        ('name = "x"', "not a valid method card"),
        (
            'name="x"\ntitle=""\npaper=""\nstatus="good"\nsummary=""\nwhat_for=""\nwhen_not=""\npython=""',
            "status 'good'",
        ),
    ],
)
def test_a_broken_card_is_named(tmp_path, text, message):
    card = tmp_path / "card.toml"
    card.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        catalog._read(card, "p.curation.x")
    assert str(card) in str(error.value)


def test_a_third_party_package_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "otherpackage" / "curation" / "foo"
    folder.mkdir(parents=True)
    (tmp_path / "otherpackage" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (folder / "card.toml").write_text(
        'name="foo"\ntitle="t"\npaper="p"\nstatus="stable"\nsummary="s"\nwhat_for="w"\nwhen_not="n"\npython=""'
    )
    information = tmp_path / "otherpackage-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: otherpackage\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[modelwright.methods]\nother = otherpackage\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog.cards.cache_clear()
    try:
        assert catalog.find("foo").package == "otherpackage.curation.foo"
        assert catalog.find("foo").stage == "curation"
    finally:
        monkeypatch.undo()
        catalog.cards.cache_clear()
