"""A sequence of edits comes off to the last bit, resumes with the same bits, and says what it did to the model."""

import errno
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from modelwright import files
from modelwright.editing.edit import edits_on, load_edit
from modelwright.editing.editor import make_editor
from modelwright.editing.ice import ContextEdit
from modelwright.editing.requests import EditRequest
from modelwright.errors import DivergedError, UserError
from modelwright.evaluation.asking import SHORT, Layout
from modelwright.evaluation.editing_evaluation import SequentialEditing, collapsed, world_tasks
from modelwright.evaluation.editing_evaluation import sequence as sequence_module
from modelwright.evaluation.editing_evaluation.abilities import continuation_scores, facts_to_keep
from modelwright.evaluation.editing_evaluation.neutral import Neutral
from modelwright.evaluation.editing_evaluation.sequence import State, retained
from modelwright.evaluation.editors import laid_out
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent

LAYOUT = Layout(kind="raw", new_tokens=6)
NEUTRAL = ["The rain had stopped by the time we reached the village.", "To make the dough, mix flour and water."]
REQUESTS = [EditRequest(f"Where is {name}? In", name, place) for name, place in zip(["Bo", "Ky", "Zed", "Lu"], "ABCD")]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return tiny_model("llama")


def sequence(model, tokenizer, **changes):
    options = {
        "editor": make_editor("ft-m", {"layer": 1, "learning_rate": 0.05, "steps": 30}), "requests": REQUESTS,
        "checkpoints": [0, 1, 2, 4], "neutral": NEUTRAL, "layout": LAYOUT, **changes,
    }  # fmt: skip
    return SequentialEditing(model=model, tokenizer=tokenizer, **options)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_edit_is_the_base_and_all_come_off(model, tokenizer):
    before, logits = weights(model), []
    run = sequence(model, tokenizer)
    for state in run:
        logits.append(model(torch.arange(5)[None]).logits)
        if state.n == 0:
            assert same(before, weights(model))
            assert state.measured["kl"] < 1e-5
            assert state.measured["retention"] == {"last": None, "all": None}
            assert state.delta_norms == {}
        else:
            assert not same(before, weights(model))
            assert state.measured["max_delta_norm"] == max(state.delta_norms.values()) > 0
            assert state.measured["retention"]["last"] == 1.0
        state.record(mine=state.n)
    assert [s["n"] for s in run.states] == [s["mine"] for s in run.states] == [0, 1, 2, 4]
    assert 0 < run.states[1]["kl"] < run.states[3]["kl"]
    run.restore()
    assert same(before, weights(model))
    assert list(run.to_pandas()["n"]) == [0, 1, 2, 4]


@pytest.mark.parametrize("editor", ["ft-m", "grace"])
def test_a_killed_sequence_goes_on_with_the_same_bits(model, tokenizer, tmp_path, editor):
    made = make_editor(editor, {"layer": 1, "learning_rate": 0.05 if editor == "ft-m" else 0.5, "steps": 10})
    options = {"editor": made, "checkpoints": [1, 3, 4]}
    whole = sequence(model, tokenizer, folder=tmp_path / "a", **options)
    states = []
    for state in whole:
        states.append((state.n, weights(model), model(torch.arange(9)[None]).logits))
    measured = whole.states
    whole.restore()

    cut = sequence(model, tokenizer, folder=tmp_path / "b", **options)
    for _ in itertools.islice(cut, 2):  # killed while the second state was being looked at
        pass
    cut.restore()
    # Of whole weights and memories there is a state for each checkpoint and the last one.
    kept = {"a": ["00001", "00003", "00004"], "b": ["00001", "00003"]}
    for name, numbers in kept.items():
        assert sorted(path.name for path in (tmp_path / name / "states").iterdir()) == numbers
        assert not (tmp_path / name / "edits").exists()
    fresh = tiny_model("llama")
    again = sequence(fresh, tokenizer, folder=tmp_path / "b", **options)
    seen = []
    for state in again:
        seen.append(state.n)
        _, expected, logits = next(s for s in states if s[0] == state.n)
        assert same(expected, weights(fresh))
        assert torch.equal(logits, fresh(torch.arange(9)[None]).logits)
    assert seen == [3, 4]
    assert again.states == measured
    again.restore()
    # All is there: nothing is measured again.
    assert sequence(fresh, tokenizer, folder=tmp_path / "b", **options).run() == measured


def test_factors_are_kept_edit_by_edit(model, tokenizer, tmp_path):
    options = {"editor": make_editor("rome", {"layer": 0, "steps": 2}), "checkpoints": [1, 3]}
    expected = []
    for _ in (run := sequence(model, tokenizer, folder=tmp_path / "a", **options)):
        expected.append(weights(model))
    assert len(run._edits) == 3
    run.restore()
    assert [path.name for path in sorted((tmp_path / "a" / "edits").iterdir())] == ["00000", "00001", "00002"]
    assert not (tmp_path / "a" / "states").exists()
    shutil.rmtree(tmp_path / "a" / "edits" / "00002")
    again = sequence(model, tokenizer, folder=tmp_path / "a", **options)
    again._write_up_to(3, Silent())
    assert same(expected[1], weights(model))
    again.restore()


@pytest.fixture(params=["ft-m", "grace"])
def growing(request, tokenizer, tmp_path):
    """A sequence of one of the editors whose edits take in those before; returns what it left. In bfloat16, where what
    is added and the sums round differently."""
    rate = 0.05 if request.param == "ft-m" else 0.5
    made = make_editor(request.param, {"layer": 1, "learning_rate": rate, "steps": 4})
    model = tiny_model("llama").to(torch.bfloat16)
    before = weights(model)

    def run_through(folder):
        run = sequence(model, tokenizer, folder=folder, editor=made, checkpoints=[1, 4])
        try:
            for _ in run:
                ends, logits = weights(model), model(torch.arange(9)[None]).logits
        finally:
            run.restore()
            assert same(before, weights(model))
        return run.states, ends, logits

    run_through.whole = run_through(tmp_path / "whole")
    return run_through


def failing(real, when, error, counts=lambda *args: True):
    calls = itertools.count(1)

    def call(*args, **keys):
        if counts(*args) and next(calls) == when:
            raise error
        return real(*args, **keys)

    return call


@pytest.mark.parametrize("when", [1, 2, 3, 4])
@pytest.mark.parametrize("moment", ["saving", "replacing", "forgetting"])
def test_a_kill_or_a_full_disk_at_any_moment_leaves_what_is_needed(growing, tmp_path, monkeypatch, moment, when):
    folder = tmp_path / "cut"
    full, killed = OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()

    def is_state(path):
        if found := Path(path).parent.name == "states" and Path(path).name.isdigit():
            (Path(path) / "edit.json").rename(Path(path) / "gone")  # killed with half of it removed
        return found

    with monkeypatch.context() as patched:
        if moment == "saving":
            patched.setattr("safetensors.torch.save_file", failing(save_file, when, full))
        elif moment == "replacing":
            patched.setattr(files, "_replace", failing(files._replace, when, killed))
        else:
            patched.setattr(sequence_module.shutil, "rmtree", failing(shutil.rmtree, min(when, 2), killed, is_state))
        if moment == "saving":
            with pytest.raises(UserError, match="disk is full"):
                growing(folder)
        else:
            with pytest.raises(KeyboardInterrupt):
                growing(folder)
    (folder / "states" / ".00003.0123abcd.partial").mkdir(parents=True, exist_ok=True)  # what SIGKILL leaves
    states, ends, logits = growing(folder)
    assert states == growing.whole[0]
    assert same(ends, growing.whole[1])
    assert torch.equal(logits, growing.whole[2])
    assert sorted(path.name for path in (folder / "states").iterdir()) == ["00001", "00004"]


def test_whole_weights_take_the_room_of_the_checkpoints_and_the_last_state_goes_on_by_itself(
    model, tokenizer, tmp_path
):
    def size(folder):
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    run = sequence(model, tokenizer, folder=tmp_path / "a", checkpoints=[4])
    sizes = []
    for n in range(1, 5):
        run._write_up_to(n, Silent())
        sizes.append(size(tmp_path / "a"))
        assert len(edits_on(model)) == 1
    assert len(set(sizes)) == 1
    expected = weights(model)
    run.restore()
    edit = load_edit(tmp_path / "a" / "states" / "00004")
    assert edit.requests == tuple(REQUESTS)
    before = weights(model)
    with edit.applied(model):
        assert same(expected, weights(model))
    assert same(before, weights(model))
    change = torch.stack([(a - b).norm() for a, b in zip(expected, before)])
    assert sum(edit.norms().values()) == pytest.approx(float(change.sum()), rel=1e-5)
    with pytest.raises(UserError, match="was fitted on a model with fingerprint"):
        edit.apply_(tiny_model("llama", seed=3))


def test_an_editor_that_cannot_be_saved_is_refused_where_edits_are_kept(model, tokenizer, tmp_path):
    """It goes through without a folder; with one, the first edit is refused and the model has its bits again."""

    class Unsaved(ContextEdit):
        kind = "of no card"

    class Editor(type(make_editor("ice"))):
        def fit(self, model, tokenizer, requests, *, progress=None):
            return Unsaved("unsaved", None, requests)

    before = weights(model)
    assert len(sequence(model, tokenizer, editor=Editor()).run()) == 4
    with pytest.raises(UserError, match=r"unsaved edit cannot be saved"):
        sequence(model, tokenizer, editor=Editor(), folder=tmp_path / "kept").run()
    assert same(before, weights(model))
    assert not edits_on(model)
    assert not list((tmp_path / "kept").glob("edits/*"))


def test_a_folder_of_another_sequence_is_refused(model, tokenizer, tmp_path):
    sequence(model, tokenizer, folder=tmp_path / "a", checkpoints=[1]).run()
    other = {"folder": tmp_path / "a", "checkpoints": [1], "requests": REQUESTS[1:]}
    with pytest.raises(UserError, match="holds another sequence"):
        sequence(model, tokenizer, **other).run()
    (state,) = sequence(model, tokenizer, force=True, **other).run()
    assert state["retention"]["all"] == 1.0
    (tmp_path / "a" / "sequence.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="holds another sequence"):
        sequence(model, tokenizer, **other).run()
    shutil.rmtree(tmp_path / "a")


def test_a_batch_is_one_fit(model, tokenizer):
    run = sequence(
        model, tokenizer, batch_size=2, checkpoints=[2, 4], editor=make_editor("rome", {"layer": 0, "steps": 2})
    )
    for state in run:
        assert len(state.edits) == state.n // 2
        assert [len(edit.requests) for edit in state.edits] == [2] * len(state.edits)
    run.restore()


def test_bad_plans_are_refused(model, tokenizer):
    for points in ([], [2, 1], [1, 1], [-1, 2]):
        with pytest.raises(UserError, match="in increasing order"):
            sequence(model, tokenizer, checkpoints=points)
    with pytest.raises(UserError, match="only 4 requests"):
        sequence(model, tokenizer, checkpoints=[5])
    with pytest.raises(UserError, match="Checkpoint 1 is no multiple of the batch of 2"):
        sequence(model, tokenizer, batch_size=2, checkpoints=[1, 2])
    contradiction = [*REQUESTS[:1], EditRequest("Where is Bo? In", "Bo", "Z")]
    with pytest.raises(UserError, match="contradict each other"):
        sequence(model, tokenizer, requests=contradiction, checkpoints=[1])


def test_valves_stop_it(model, tokenizer):
    run = sequence(model, tokenizer, max_delta_norm=1e-4)
    assert [s["n"] for s in run.run()] == [0, 1]
    assert "has changed by" in run.stopped
    wild = make_editor("ft-m", {"layer": 1, "learning_rate": 50.0, "steps": 20})
    run = sequence(model, tokenizer, editor=wild, stop_on_collapse=True)
    states = run.run()
    assert states[-1]["collapsed"]
    assert run.stopped == "the model has collapsed"
    assert states[-1]["n"] < 4


def test_the_model_is_restored_when_measuring_fails(model, tokenizer):
    before = weights(model)

    def fail(state):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sequence(model, tokenizer, checkpoints=[1]).run({"x": fail})
    assert same(before, weights(model))


def test_collapse():
    base = {"perplexity": 5.0, "repeated": 0.1}
    assert not collapsed({"perplexity": 49.0, "repeated": 0.4}, base)
    assert collapsed({"perplexity": 51.0, "repeated": 0.0}, base)
    assert collapsed({"perplexity": None, "repeated": None}, base)
    assert collapsed({"perplexity": 5.0, "repeated": 0.6}, base)
    assert not collapsed({"perplexity": 5.0, "repeated": 0.9}, {"perplexity": 5.0, "repeated": 0.8})
    assert not collapsed({}, {})


@torch.no_grad()
def test_neutral_text_is_measured_as_plain_torch_does(model, tokenizer):
    neutral = Neutral(model, tokenizer, NEUTRAL)
    other = tiny_model("llama", seed=1)
    found = neutral.measure(other, lambda text: text)
    nats = divergence = tokens = 0.0
    for text in NEUTRAL:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        p = model(ids).logits[0, :-1].double().log_softmax(-1)
        q = other(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= float(q.gather(1, ids[0, 1:, None]).sum())
        divergence += float((p.exp() * (p - q)).sum())
        tokens += ids.shape[1] - 1
    assert found["perplexity"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-4)
    assert found["kl"] == pytest.approx(divergence / tokens, rel=2e-3)  # the base's side is kept in float16
    with pytest.raises(UserError, match="no two tokens"):
        Neutral(model, tokenizer, [""])


@torch.no_grad()
def test_likelihoods_do_not_depend_on_the_batch(model, tokenizer):
    pairs = [("a long prompt here", "one"), ("b", "another one"), ("middle one", "x")]
    together = continuation_scores(model, tokenizer, pairs, batch_size=3)
    for (prompt, text), score in zip(pairs, together, strict=True):
        ids = tokenizer(f"{prompt} {text}", return_tensors="pt")["input_ids"]
        n = len(tokenizer(f" {text}")["input_ids"])
        logs = model(ids).logits[0, -n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None])
        assert score == pytest.approx(float(logs.mean()), abs=1e-4)


@torch.no_grad()
def test_a_chats_prompt_gets_no_second_first_token(model):
    marked = byte_tokenizer()
    start = TemplateProcessing(
        single=f"{marked.eos_token} $A", special_tokens=[(marked.eos_token, marked.eos_token_id)]
    )
    marked.backend_tokenizer.post_processor = start
    marked.bos_token = marked.eos_token
    assert marked("a")["input_ids"][0] == marked.bos_token_id
    text = marked.bos_token + "a prompt"
    ids = torch.tensor([marked(text + " x", add_special_tokens=False)["input_ids"]])
    n = len(marked(" x", add_special_tokens=False)["input_ids"])
    logs = model(ids).logits[0, -n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None])
    for prompt in (text, "a prompt"):
        (score,) = continuation_scores(model, marked, [(prompt, "x")])
        assert score == pytest.approx(float(logs.mean()), abs=1e-4)


def test_generated_abilities_and_facts_to_keep(model, tokenizer):
    tasks = world_tasks(tokenizer, LAYOUT, tests=6)
    assert list(tasks) == ["arithmetic", "copying", "context"]
    for task in tasks.values():
        assert all(t.answer not in t.wrong and len(set(t.wrong)) == 3 for t in task.tests)
        found = task.measure(model)
        assert found["chance"] == 0.25
        assert 0 <= found["likelihood"] <= 1
    assert [t.prompt for t in world_tasks(tokenizer, LAYOUT, tests=6)["context"].tests] == [
        t.prompt for t in tasks["context"].tests
    ]
    with pytest.raises(UserError, match="no ability 'arithmetics'"):
        world_tasks(tokenizer, LAYOUT, ["arithmetics"])
    assert facts_to_keep(model, tokenizer, LAYOUT, [{"question": "Who?", "answer": "zzzz"}]) is None


class Ruinous(type(make_editor("ft-m"))):
    """Writes two facts and then finds the model ruined."""

    def fit(self, model, tokenizer, requests, *, progress=None):
        if requests[0].subject == "Zed" or self.seed_of_ruin:
            raise DivergedError("The loss is not finite.")
        return super().fit(model, tokenizer, requests, progress=progress)

    seed_of_ruin = False


def test_a_ruined_model_ends_the_sequence_with_a_last_state(model, tokenizer, tmp_path):
    """Collapse is what is measured: it must not cost the numbers, of this editor or of the next."""
    before = weights(model)
    options = {
        "editor": Ruinous(layer=1, learning_rate=0.05, steps=10), "folder": tmp_path / "a", "checkpoints": [0, 1, 4],
    }  # fmt: skip
    run = sequence(model, tokenizer, **options)
    states = run.run({"seen": lambda state: len(state.requests)})
    assert [s["n"] for s in states] == [s["seen"] for s in states] == [0, 1, 2]
    assert run.stopped == "no further fact could be written, for its numbers were not finite"
    assert same(before, weights(model))
    again = sequence(model, tokenizer, **options)
    assert again.run({"seen": lambda state: 1 / 0}) == states
    assert again.stopped == run.stopped
    # Before the first edit it is the options that are bad.
    Ruinous.seed_of_ruin = True
    try:
        with pytest.raises(DivergedError):
            sequence(model, tokenizer, editor=Ruinous(layer=1)).run()
    finally:
        Ruinous.seed_of_ruin = False


def test_weights_that_are_no_numbers_trip_the_valve(model, tokenizer):
    run = sequence(model, tokenizer, max_delta_norm=1e9, checkpoints=[1, 2, 3])
    for state in run:
        if state.n == 1:
            name = next(iter(state.delta_norms))
            run._originals[name][0, 0] = float("nan")
    assert [s["n"] for s in run.states] == [1, 2]
    assert run.states[-1]["max_delta_norm"] is None
    assert "not finite" in run.stopped
    run.restore()


def test_edits_of_an_unknown_run_are_not_taken_for_this_ones(model, tokenizer, tmp_path):
    options = {"folder": tmp_path / "a", "checkpoints": [2]}
    sequence(model, tokenizer, **options).run()
    (tmp_path / "a" / "sequence.json").unlink()
    sequence(model, tokenizer, **{**options, "checkpoints": [1]}).run()
    assert [path.name for path in (tmp_path / "a" / "states").iterdir()] == ["00001"]


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def asked_of(monkeypatch):
    """Has the prompts of the retention noted instead of answered."""
    seen = []

    def note(model, tokenizer, prompts, layout, **options):
        seen.extend((prompt, layout.kind) for prompt in prompts)
        return ["A"] * len(prompts)

    monkeypatch.setattr("modelwright.evaluation.editing_evaluation.sequence.answers", note)
    return seen


def test_facts_are_asked_as_users_will_ask(model, tokenizer, monkeypatch):
    """Questions through a chat's template, inside which facts in the prompt stand; the rest is completed."""
    facts = [EditRequest("Where is Bo?", "Bo", "A"), EditRequest("Ky lives in", "Ky", "B")]
    chat = byte_tokenizer()
    chat.chat_template = CHAT
    for editor, kind, first, second in (
        (None, "chat", "<user>Where is Bo?\n<assistant>", "Ky lives in"),
        (None, "qa", "Where is Bo?", "Ky lives in"),  # the request holds the frame, if it was written with one
        ("ice", "qa", "{facts}Q: Where is Bo?\nA:", "{facts}Ky lives in"),
        ("ice", "chat", "<user>{facts}Where is Bo?\n<assistant>", "{facts}Ky lives in"),
    ):
        seen = asked_of(monkeypatch)
        edits = [] if editor is None else [make_editor(editor).fit(model, chat, facts)]
        said = retained(State(2, model, edits, facts, {}), facts, chat, Layout(kind=kind, new_tokens=6))
        assert said == [True, False]
        front = edits[0].context if edits else ""
        assert {prompt.replace(front, "{facts}") if front else prompt for prompt, _ in seen} == {
            (f"<system>{SHORT}\n" if kind == "chat" else "") + first, second,
        }  # fmt: skip
        # A prompt that is no chat gets the tokenizer's own first token.
        assert dict(seen)[second.replace("{facts}", front)] == ("raw" if kind == "chat" else "qa")


def test_abilities_under_facts_in_the_prompt_stay_inside_the_chat(model):
    chat = byte_tokenizer()
    chat.chat_template = CHAT
    edit = make_editor("ice").fit(model, chat, REQUESTS[:1])
    (task,) = world_tasks(chat, Layout(kind="chat"), ["arithmetic"], tests=1).values()
    state = State(1, model, [edit], REQUESTS[:1], {})
    (test,) = task.tests
    assert task._prompt(test, state) == f"<system>{SHORT}\n<user>{edit.context}{test.question}\n<assistant>"
    assert task._prompt(test, State(0, model, [], [], {})) == test.prompt


@torch.no_grad()
def test_likelihoods_under_an_edit_that_reads_whole_rows(model, tokenizer, monkeypatch):
    """The prompt has a call of its own, so that the edit decides without seeing the answer."""
    pairs = [("a long prompt here", "one"), ("b", "another one")]
    plain = continuation_scores(model, tokenizer, pairs)
    edit = type("Reader", (), {"reads_rows": True})()
    monkeypatch.setattr("modelwright.evaluation.editing_evaluation.abilities.edits_on", lambda model: [edit])
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]) if "input_ids" in kwargs else None,
        with_kwargs=True,
    )
    prompts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs]
    assert continuation_scores(model, tokenizer, pairs, batch_size=1) == pytest.approx(plain, abs=1e-4)
    assert lengths[::2] == prompts
    lengths.clear()
    assert continuation_scores(model, tokenizer, pairs) == pytest.approx(plain, abs=1e-4)
    assert lengths[0] == max(prompts)
    assert len(lengths) == 2  # one batch


def test_other_abilities_are_measured_on_the_edits_that_are_there(model, tokenizer, tmp_path):
    options = {"folder": tmp_path / "a", "checkpoints": [0, 1, 2]}
    tasks = {n: world_tasks(tokenizer, LAYOUT, ["arithmetic"], tests=n) for n in (2, 3)}
    first = sequence(model, tokenizer, **options).run(tasks[2])
    assert sequence(model, tokenizer, **options, editor=never(tokenizer)).run(tasks[2]) == first
    lengths = []
    second = sequence(model, tokenizer, **options, editor=never(tokenizer)).run(
        {**tasks[3], "edits": lambda state: lengths.append([len(edit.requests) for edit in state.edits])}
    )
    assert lengths == [[], [1], [2]]
    assert [s["retention"] for s in second] == [s["retention"] for s in first]
    assert tasks[2]["arithmetic"].identity != tasks[3]["arithmetic"].identity


def never(tokenizer):
    """The editor of the other sequences, which must not fit again."""
    editor = make_editor("ft-m", {"layer": 1, "learning_rate": 0.05, "steps": 30})
    editor.fit = None
    return editor


def test_what_an_editor_lacks_is_said_before_the_first_edit(model, tokenizer):
    for name, said in (("kn", "'Where is Bo[?] In' has no old_answer"), ("memit", "needs key statistics"),
                       ("mend", "not trained"), ("serac", "not trained"), ("ike", "needs facts to show")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            sequence(model, tokenizer, editor=make_editor(name))


def test_paraphrases_are_laid_out_with_their_request():
    fact = EditRequest("Where is {}?", "Bo", "A", paraphrases=("Bo is where?", "Bo lives in"))
    (laid,) = laid_out([fact], make_editor("ft-m"), Layout(kind="qa"))
    assert laid.text == "Q: Where is Bo?\nA:"
    assert laid.paraphrases == ("Q: Bo is where?\nA:", "Bo lives in")
    assert laid_out([fact], make_editor("ice"), Layout(kind="qa")) == [fact]
