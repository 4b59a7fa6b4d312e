import json
from types import SimpleNamespace

import pytest

from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.verbs.verify import Verify, parse_seeds
from modelwright.verify import runner
from verify import toy_claims as toys


@pytest.fixture(autouse=True)
def toy_catalog(monkeypatch, tmp_path):
    card = SimpleNamespace(name="toy", has_claim=True)
    bare = SimpleNamespace(name="bare", has_claim=False)
    known = {"toy": card, "bare": bare}
    monkeypatch.setattr("modelwright.catalog.find", known.__getitem__)
    monkeypatch.setattr("modelwright.catalog.cards", lambda: known)
    monkeypatch.setattr(runner, "load_claim", lambda card: toys.IN_PART)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_full_seeds_are_kept_once(toy_catalog):
    kept = toy_catalog / "results" / "claims" / "toy.cpu.json"
    result = Verify(method="toy", workers=2).run(Silent())
    stored = json.loads(kept.read_text())
    assert result.pop("stored") == "results/claims/toy.cpu.json"
    assert stored == result
    kept.write_text("mine")
    assert "stored" not in Verify(method="toy", workers=2).run(Silent())
    assert kept.read_text() == "mine"
    Verify(method="toy", workers=2, force=True).run(Silent())
    assert json.loads(kept.read_text())["verdict"] == "holds in part"


def test_fewer_seeds_are_kept_only_on_request(toy_catalog):
    assert "stored" not in Verify(method="toy", seeds="2").run(Silent())
    assert not (toy_catalog / "results").exists()
    Verify(method="toy", seeds="2", output=toy_catalog / "two.json").run(Silent())
    assert json.loads((toy_catalog / "two.json").read_text())["seeds"] == [0, 1]
    with pytest.raises(UserError, match="exists already"):
        Verify(method="toy", seeds="2", output=toy_catalog / "two.json").run(Silent())


def test_all(toy_catalog, capsys):
    verb = Verify(method="all", scale="miniature")
    result = verb.run(Silent())
    assert [d["method"] for d in result["results"]] == ["toy"]
    assert not (toy_catalog / "results").exists()
    with pytest.raises(UserError, match="'all'"):
        Verify(method="all", output=toy_catalog / "x.json").run(Silent())
    verb.show(result)
    printed = " ".join(capsys.readouterr().out.split())
    for piece in ("Ours", "Strong baseline", "Verdict: ", "0.3 lower (Toy, 2024)", "bits per byte, lower is better"):
        assert piece in printed
    # Square brackets would be markup to rich; all text goes through unread.
    result["results"][0]["statement"] = "[bold]odd[/nothing]"
    verb.show(result)
    assert "[bold]odd[/nothing]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "seeds"), [("2", [5, 6]), ("4", [5, 6, 0, 1]), ("0,1,7", [0, 1, 7]), ("7,", [7]), (" 1 , 2 ", [1, 2])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text, [5, 6]) == seeds


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1,-2", "1.5", ","])
def test_bad_seeds(text):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text, [0, 1])
