"""The verdict: how many edits a model stands, and with which editor; and the page and command that say so."""

import json
import re

import pytest

from modelwright.data.write import write_rows
from modelwright.errors import UserError
from modelwright.evaluation.editing_evaluation import advice, stands
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.report.editing import render_sequence
from modelwright.verbs.edit_sequence import EditSequence


def state(n, ability, kept=1.0, collapsed=False):
    tasks = {"arithmetic": {"generation": ability, "likelihood": 0.9, "chance": 0.25}}
    return {"n": n, "retention": {"last": 1.0, "all": kept if n else None}, "collapsed": collapsed, **tasks}


def test_edits_that_a_model_stands():
    assert stands([state(0, 0.8), state(10, 0.8), state(50, 0.73), state(100, 0.7)]) == 50
    assert stands([state(0, 0.8), state(10, 0.8), state(50, 0.8, collapsed=True)]) == 10
    assert stands([state(0, 0.8), state(1, 0.1), state(10, 0.8)]) == 0
    assert stands([state(0, 0.09), state(1, 0.0)]) == 1  # what was never there cannot be lost
    guessing = [{**state(n, 0.0), "arithmetic": {"likelihood": v, "chance": 0.25}} for n, v in ((0, 0.3), (1, 0.2))]
    assert stands(guessing) == 1
    assert "none of the abilities" in advice({"rome": guessing})
    assert stands([]) == 0


def test_advice():
    runs = {
        "rome": [state(0, 0.8), state(10, 0.8), state(50, 0.1)],
        "memit": [state(0, 0.8), state(10, 0.8), state(50, 0.79, 0.95)],
        "kn": [state(0, 0.8), state(10, 0.8, 0.0), state(50, 0.8, 0.0)],
    }
    said = advice(runs)
    assert said.startswith("Use memit: the model stands at least 50 edits with 95% of them kept")
    assert said.endswith("The others stand: rome 10. Too few facts are written by kn.")
    assert "tune them" in advice({"kn": runs["kn"]})
    assert "stands 1 edit with" in advice({"rome": [state(0, 0.8), state(1, 0.8), state(10, 0.1)]})
    said = advice({"rome": [state(0, 0.8), state(1, 0.1)], "kn": runs["kn"]})
    assert said == (
        "No editor can be recommended: with rome, some ability falls below 90% of what it was by 1 edit. Too few facts "
        "are written by kn."
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    save_model(tiny_model("llama"), byte_tokenizer(), path)
    return path


def test_the_command_writes_curves_and_goes_on(folder, tmp_path):
    rows = [{"prompt": f"Where is {n}? In", "subject": n, "target": t} for n, t in (("Bo", "A"), ("Ky", "B"))]
    write_rows(tmp_path / "requests.jsonl", rows)
    options = {"ft-m.layer": 1, "ft-m.learning_rate": 0.05, "grace.layer": 1, "grace.steps": 5}
    verb = EditSequence(
        model=str(folder), requests=[str(tmp_path / "requests.jsonl")], output=tmp_path / "out",
        methods=["ft-m,grace"], checkpoints=["1,2"], tasks=["arithmetic"], limit=4, options=options, new_tokens=4,
    )  # fmt: skip
    said = verb.run(Silent())
    result = json.loads((tmp_path / "out" / "sequence.json").read_text())
    assert [s["n"] for s in result["states"]["ft-m"]] == [0, 1, 2]
    page = (tmp_path / "out" / "sequence.html").read_text()
    assert said["advice"][:20] in page
    assert page.count("<svg") >= 7
    assert "Arithmetic, by likelihood" in page
    # This model cannot calculate, so that it still cannot is no praise of an editor.
    assert result["states"]["ft-m"][0]["arithmetic"]["generation"] == 0
    assert result["stands"] == {}
    assert "stands" not in said
    assert re.search(r"ft-m</th>\s*<td[^>]*>–<", page)
    assert verb.run(Silent()) == said
    verb.checkpoints = ["3"]
    with pytest.raises(UserError, match="only 2 requests: give more, or other checkpoints, such as --checkpoints 1,2"):
        verb.run(Silent())
    verb.checkpoints = ["0"]
    with pytest.raises(UserError, match="only checkpoint is 0"):
        verb.run(Silent())
    verb.checkpoints = ["x"]
    with pytest.raises(UserError, match="whole numbers such as"):
        verb.run(Silent())
    verb.limit = 0
    with pytest.raises(UserError, match="--limit is 0: give at least 1"):
        verb.run(Silent())
    verb.limit = 4
    for name, bad, good in (("batch_size", 0, 16), ("kept_share", 2.0, 0.9), ("output", folder, verb.output)):
        setattr(verb, name, bad)
        with pytest.raises(UserError, match="at least 1|at most 1|a model's folder"):
            verb.run(Silent())
        setattr(verb, name, good)
    verb.checkpoints, verb.methods, verb.options = ["1"], ["ft-m,kn"], {}
    with pytest.raises(UserError, match="has no old_answer"):
        verb.run(Silent())
    verb.methods, verb.options = ["ft-m,grace"], options
    verb.checkpoints, verb.tasks = ["1"], ["no_such_task_of_lm_eval"]
    verb.output = tmp_path / "other"
    with pytest.raises(UserError, match="lm-eval"):
        verb.run(Silent())


def test_the_page_tells_more_editors_apart_than_it_has_colours(tmp_path):
    """From the ninth on marks are hollow; one ruined model does not press the others to the axis."""
    runs = {f"m{i}": [{**state(n, 0.8), "max_delta_norm": n * 0.1} for n in (0, 1, 10)] for i in range(9)}
    runs["m8"][2]["max_delta_norm"] = 3e5
    result = {"states": runs, "advice": "", "stands": dict.fromkeys(runs, 10)}
    page = render_sequence(result, tmp_path / "page.html", title="x").read_text()
    assert re.search(r"m0</th>\s*<td[^>]*>10<", page)
    assert page.count("○") == 2  # one in each legend
    assert "●" in page
    assert "100k" in page
    runs["m8"][2]["max_delta_norm"] = 3.0
    assert "100k" not in render_sequence(result, tmp_path / "page.html", title="x").read_text()


def test_tasks_with_prompts_of_their_own_are_refused_for_facts_in_the_prompt(folder, tmp_path, monkeypatch):
    write_rows(tmp_path / "requests.jsonl", [{"prompt": "Where is Bo? In", "subject": "Bo", "target": "A"}])
    write_rows(tmp_path / "text.jsonl", [{"text": "Bo is in A. Ky is in B."}])
    verb = EditSequence(
        model=str(folder), requests=[str(tmp_path / "requests.jsonl")], output=tmp_path / "out",
        methods=["memit,ice"], checkpoints=["1"], tasks=["gsm8k"], statistics=str(tmp_path / "text.jsonl"),
    )  # fmt: skip
    monkeypatch.setattr(EditSequence, "_abilities", lambda self, *args: {"lm_eval": lambda state: {}})
    with pytest.raises(UserError, match="the facts of ice cannot be put"):
        verb.run(Silent())
    assert not list(tmp_path.glob("out*"))  # nor were key statistics collected first, which take long
