import json

import pytest

from forked import modelwright
from modelwright.editing.mend import MEND
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.edit_train import EditTrain


@pytest.fixture
def files(tmp_path):
    save_model(tiny_model("llama"), byte_tokenizer(), tmp_path / "model")
    rows = [
        {"prompt": "The letter of {} is", "subject": f"Land {i}", "target": c, "paraphrases": ["{} has the letter"]}
        for i, c in enumerate("ZSEKTM")
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text('{"text": "an untouched text"}\n')
    return tmp_path


def verb(files, **options):
    given = {"model": str(files / "model"), "requests": [str(files / "facts.jsonl")], "output": files / "mend"}
    quick = {"rank": 8, "steps": 4, "accumulate": 2}
    return EditTrain(**{"method": "mend", "set": quick, **given, **options})


def test_mend_is_trained_and_loads(files):
    result = verb(files, locality=[str(files / "texts.jsonl")]).run(Silent())
    assert result["steps"] == 4
    assert MEND(trained=files / "mend").networks.options["rank"] == 8
    assert sorted(p.name for p in files.iterdir()) == ["facts.jsonl", "mend", "model", "texts.jsonl"]
    with pytest.raises(UserError, match="exists already"):
        verb(files).run(Silent())
    verb(files, force=True).run(Silent())


def test_wrong_options(files):
    with pytest.raises(UserError, match="did you mean 'mend'"):
        verb(files, method="mendd").run(Silent())
    with pytest.raises(UserError, match="no option 'rankk'"):
        verb(files, set={"rankk": 3}).run(Silent())
    assert not (files / "mend").exists()


@pytest.mark.slow
def test_on_the_command_line(files, monkeypatch):
    monkeypatch.chdir(files)
    command = "edit train mend --model model --requests facts.jsonl --set rank=4 --set steps=2 --output trained --json"
    done = modelwright(*command.split())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    again = modelwright(*command.split())
    assert again.returncode == 2
    assert "exists already" in again.stderr
