import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from editing.small_facts import HOMES, SUBJECTS, TOKENIZER, requests, texts, trained
from modelwright import catalog
from modelwright.editing import Editor, KeyStatistics, load_edit, make_editor
from modelwright.editing.edit import base_fingerprint
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.named_statistics import NamedStatistics
from modelwright.editing.pmet import PMET
from modelwright.errors import UserError
from modelwright.models.loading import load_model, load_tokenizer, save_model
from modelwright.progress import Silent
from modelwright.verbs.edit import EditApply, EditModel, EditRevert
from modelwright.verbs.edit_look import EditStatistics, EditTrace

OPTIONS = {"layers": [0, 1], "fact_token": "last", "ridge": 0.01, "weight": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    save_model(trained(), TOKENIZER, folder / "model")
    with (folder / "edits.jsonl").open("w") as file:
        file.writelines(json.dumps(request.to_dict()) + "\n" for request in requests())
    with (folder / "known.jsonl").open("w") as file:
        for s, h in zip(SUBJECTS, HOMES):
            file.write(json.dumps({"prompt": f"{s} lives in", "subject": s, "attribute": h}) + "\n")
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts())
    run(
        EditStatistics, model=str(folder / "model"), data=[str(folder / "text.jsonl")], layers=[0, 1],
        output=folder / "keys.safetensors", tokens=2000,
    )  # fmt: skip
    return folder


def run(verb, **options):
    return verb(**options).run(Silent())


def edit(folder, output, **others):
    return run(
        EditModel, method="memit", requests=[str(folder / "edits.jsonl")], output=output,
        **{
            "model": str(folder / "model"), "statistics": str(folder / "keys.safetensors"), "set": OPTIONS, **others
        },
    )  # fmt: skip


def same(one, other):
    one, other = (load_file(path / "model.safetensors") for path in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_an_edited_checkpoint_is_an_ordinary_one_and_comes_back_to_the_last_bit(folder, tmp_path):
    result = edit(folder, tmp_path / "edited")
    assert result["says_target_before"] == 0
    assert result["says_target_after"] >= 7
    model, tokenizer = load_model(tmp_path / "edited"), load_tokenizer(tmp_path / "edited")
    from modelwright.editing.checkpoint import says_target

    assert sum(says_target(model, tokenizer, requests())) == result["says_target_after"]
    # Statistics of the model below the edits still fit.
    KeyStatistics.load(folder / "keys.safetensors").check(model, [0, 1])
    assert base_fingerprint(model) == model_fingerprint(load_model(folder / "model"))
    assert not same(folder / "model", tmp_path / "edited")
    back = run(EditRevert, model=str(tmp_path / "edited"), output=tmp_path / "back")
    assert back == {"output": str(tmp_path / "back"), "taken_off": 1, "left": 0}
    assert same(folder / "model", tmp_path / "back")
    assert '"modelwright_' not in (tmp_path / "back" / "config.json").read_text()
    with pytest.raises(UserError, match="has no edits to take off"):
        run(EditRevert, model=str(tmp_path / "back"), output=tmp_path / "more")


def test_a_delta_is_put_on_once_and_on_its_own_model(folder, tmp_path):
    edit(folder, tmp_path / "delta", as_delta=True)
    assert sum(f.stat().st_size for f in (tmp_path / "delta").iterdir()) < 60_000
    put = run(EditApply, model=str(folder / "model"), edit=[str(tmp_path / "delta")], output=tmp_path / "edited")
    assert put["requests"] == 8
    edit(folder, tmp_path / "direct")
    assert same(tmp_path / "direct", tmp_path / "edited")
    with pytest.raises(UserError, match="holds this edit already"):
        run(EditApply, model=str(tmp_path / "edited"), edit=[str(tmp_path / "delta")], output=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    loaded = load_edit(tmp_path / "delta")
    with loaded.applied(load_model(folder / "model")):
        pass


def test_edits_on_edits_come_off_one_by_one_or_all(folder, tmp_path):
    edit(folder, tmp_path / "one", limit=3)
    run(
        EditModel, model=str(tmp_path / "one"), method="rome", requests=[str(folder / "edits.jsonl")], limit=1,
        output=tmp_path / "two", set={"layer": 0, "fact_token": "last"}, statistics=None,
    )  # fmt: skip
    assert sorted(f.name for f in (tmp_path / "two" / "modelwright_edits").iterdir()) == ["0001", "0002"]
    run(EditRevert, model=str(tmp_path / "two"), output=tmp_path / "back to one")
    assert same(tmp_path / "one", tmp_path / "back to one")
    assert run(EditRevert, model=str(tmp_path / "two"), output=tmp_path / "none", all=True)["taken_off"] == 2
    assert same(folder / "model", tmp_path / "none")


def test_an_edited_checkpoint_that_was_trained_is_a_model_of_its_own(folder, tmp_path):
    """Statistics of the model below its edits are not those of one that was trained since."""
    edit(folder, tmp_path / "one", limit=3)
    edit(folder, tmp_path / "two", limit=1, model=str(tmp_path / "one"))
    run(EditRevert, model=str(tmp_path / "two"), output=tmp_path / "back to one")
    for name in ("one", "two", "back to one"):
        assert base_fingerprint(load_model(tmp_path / name)) == model_fingerprint(load_model(folder / "model"))
    model = load_model(tmp_path / "one")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    save_model(model, TOKENIZER, tmp_path / "trained")
    trained_on = load_model(tmp_path / "trained")
    assert base_fingerprint(trained_on) == model_fingerprint(trained_on)
    with pytest.raises(UserError, match="key statistics are of another model"):
        edit(folder, tmp_path / "three", model=str(tmp_path / "trained"))


def test_a_checkpoint_that_was_changed_afterwards_is_not_reverted(folder, tmp_path):
    edit(folder, tmp_path / "edited")
    model = load_model(tmp_path / "edited")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "edited")
    with pytest.raises(UserError, match="changed afterwards"):
        run(EditRevert, model=str(tmp_path / "edited"), output=tmp_path / "back")


@pytest.mark.parametrize("method", ["ice", "grace", "serac"])
def test_edits_that_change_no_weights_are_refused_before_the_work(folder, tmp_path, method):
    with pytest.raises(UserError, match="give --as-delta"):
        run(EditModel, model="not read", method=method, requests=["not read"], output=tmp_path / "out")


def test_edits_that_change_no_weights_need_a_delta(folder, tmp_path):
    options = {"model": str(folder / "model"), "method": "ice", "requests": [str(folder / "edits.jsonl")]}
    run(EditModel, **options, output=tmp_path / "ice", as_delta=True)
    assert load_edit(tmp_path / "ice").method == "ice"
    with pytest.raises(UserError, match="changes no weights"):
        run(EditApply, model=str(folder / "model"), edit=[str(tmp_path / "ice")], output=tmp_path / "m")


def test_tracing(folder, tmp_path, capsys):
    verb = EditTrace(
        model=str(folder / "model"), requests=[str(folder / "known.jsonl")], output=tmp_path / "t.json", samples=2
    )
    result = verb.run(Silent())
    assert result["facts"] == 8
    verb.show(result)
    assert f"--set layer={result['recommended']['layer']}" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["effects"]["mlp"]


def test_statistics_are_checked_before_the_work(folder, tmp_path):
    base = {"model": str(folder / "model"), "data": [str(folder / "text.jsonl")], "output": tmp_path / "k.safetensors"}
    with pytest.raises(UserError, match="needs no key statistics"):
        run(EditStatistics, **base, method="ice")
    result = run(EditStatistics, **base, method="rome", tokens=100)
    assert (result["tokens"], result["layers"]) == (100, [0])
    assert [f.name for f in tmp_path.iterdir()] == ["k.safetensors"]
    with pytest.raises(UserError, match="exists already"):
        run(EditStatistics, **base)


def test_statistics_can_be_collected_on_the_way(folder, tmp_path, monkeypatch):
    """The one command does what the two do, and keeps what it collected for the next run."""
    text = str(folder / "text.jsonl")
    run(EditStatistics, model=str(folder / "model"), data=[text], layers=[0, 1], output=tmp_path / "all.safetensors")
    edit(folder, tmp_path / "two", statistics=str(tmp_path / "all.safetensors"))
    result = edit(folder, tmp_path / "one", statistics=text)
    assert result["statistics"] == str(tmp_path / "one.keys.safetensors")
    assert same(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr("modelwright.editing.statistics._add", None)  # nothing is run through the model again
    edit(folder, tmp_path / "one", statistics=text, force=True)
    assert same(tmp_path / "one", tmp_path / "two")
    with pytest.raises(UserError, match="holds key statistics of other text: choose another file, or delete this one"):
        edit(folder, tmp_path / "one", statistics=str(folder / "edits.jsonl"), force=True)
    for missing in ("none.jsonl", "none.safetensors"):
        with pytest.raises(UserError, match=missing):
            edit(folder, tmp_path / "three", model="no model is looked at before", statistics=str(tmp_path / missing))
    monkeypatch.chdir(tmp_path)
    kept = NamedStatistics(text, [], Path()).path
    assert kept == tmp_path.with_name(f"{tmp_path.name}.keys.safetensors")


def test_on_the_command_line_bad_input_is_a_sentence(folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "subject": "Rome", "target": "y"}\n')
    command = [sys.executable, "-m", "modelwright", "edit", "--model", str(folder / "model"), "--output"]
    done = subprocess.run(
        [*command, str(tmp_path / "o"), "--method", "rome", "--requests", str(bad)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "bad.jsonl:1: The subject 'Rome' does not stand" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_an_edit_that_is_too_weak_says_what_to_change(folder, tmp_path):
    """The paper's λ is for large models; the weight that the warning names is enough here."""
    options = {key: value for key, value in OPTIONS.items() if key != "weight"}
    result = edit(folder, tmp_path / "weak", set=options)
    assert result["says_target_after"] == 0
    (warning,) = result["warnings"]
    assert "does not say 8 of 8 targets (that of 'Ada lives in', for one): a weight of 15000 lets a layer" in warning
    named = float(re.search(r"--set weight=(\S+) would", warning)[1])
    assert 0 < named < 100
    result = edit(folder, tmp_path / "strong", set={**options, "weight": named})
    assert result["says_target_after"] >= 7
    unlearnt = edit(folder, tmp_path / "one step", set={**OPTIONS, "steps": 1, "lr": 1e-3})
    assert "was not learnt" in unlearnt["warnings"][-1]
    assert "raise steps (1)" in unlearnt["warnings"][-1]


@pytest.mark.parametrize(
    ("method", "lacks"), [("memit", "key statistics"), ("ike", "facts to show"), ("serac", "not trained")]
)
def test_what_an_editor_lacks_is_said_before_a_model_is_loaded(folder, tmp_path, method, lacks):
    with pytest.raises(UserError, match=lacks):
        run(EditModel, model=str(tmp_path / "nowhere"), method=method, requests=[str(folder / "edits.jsonl")],
            output=tmp_path / "o", as_delta=True)  # fmt: skip


def test_a_weight_that_is_light_already_is_not_called_too_heavy():
    edit = SimpleNamespace(details={"last_loss": [0.01], "strengths": [5.0, 6.0]})
    assert "--set weight=6" in make_editor("memit", {"weight": 100}).remedy(edit)
    for weight in (0, 0.1, 6):
        assert make_editor("pmet", {"weight": weight}).remedy(edit) == PMET.stronger


def test_every_editor_knows_what_would_make_it_stronger():
    said = {name: catalog.load("editors", name).stronger for name in catalog.provided("editors")}
    assert [name for name, text in said.items() if text == Editor.stronger] == []
    assert not any(text.endswith(".") for text in said.values())
