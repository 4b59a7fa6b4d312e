"""`modelwright generate --with`: methods from the command line and from recipes, compared, interrupted, refused."""

import json

import pytest
import torch

from modelwright.decoding import run as running
from modelwright.decoding.generate import Sampling, generate
from modelwright.decoding.parts import Applied, Part, Parts
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.generate import Generate

TOKENIZER = byte_tokenizer()
STRING = "string: {shift: 6, window: 2}"
DRAFT = "multi-draft: {prompt_lookup: true}"


def attentive():
    """A random model in which attention, and so positions, decide what comes next."""
    model = tiny_model("llama", seed=3)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj):
                projection.weight.mul_(12)
        model.lm_head.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with")
    save_model(attentive(), TOKENIZER, folder / "model")
    rows = [{"prompt": "one and " * n + "two", "context": "one", "answer": "x", "id": n} for n in range(1, 7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def verb(folder, output, *methods, **keys):
    options = {"max_new_tokens": 8, "batch_size": 2, "device": "cpu", "with_": list(methods), **keys}
    return Generate(model=str(folder / "model"), prompts=[str(folder / "prompts.jsonl")], output=output, **options)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class StopAfter(Silent):
    def __init__(self, prompts):
        self.left = prompts

    def advance(self, units=1, note=""):
        self.left -= units
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_string_changes_and_leaves_no_trace_and_drafts_change_nothing(folder, tmp_path, temperature):
    def completions(name, *methods):
        found = verb(folder, tmp_path / name, *methods, temperature=temperature, seed=1).run(Silent())
        assert found.get("method", "plain") == name.removesuffix(".jsonl")
        return [row["completion"] for row in rows(tmp_path / name)], found

    plain, _ = completions("plain.jsonl")
    shifted, _ = completions("string.jsonl", STRING)
    assert shifted != plain
    if not temperature:
        drafted, found = completions("multi-draft.jsonl", DRAFT)
        assert drafted == plain
        assert found["block_efficiency"] >= 1
        assert completions("multi-draft under string.jsonl", DRAFT, STRING)[0] == shifted
    else:  # the same random streams, whatever the batch
        again = verb(folder, tmp_path / "b.jsonl", STRING, temperature=temperature, seed=1, batch_size=5)
        again.run(Silent())
        assert [row["completion"] for row in rows(tmp_path / "b.jsonl")] == shifted


def test_compared(folder, tmp_path):
    found = verb(folder, tmp_path / "a.jsonl", STRING, compare=True, samples=2, temperature=1.0).run(Silent())
    verb(folder, tmp_path / "plain.jsonl", samples=2, temperature=1.0).run(Silent())
    made = rows(tmp_path / "a.jsonl")
    assert [row["plain"] for row in made] == [row["completion"] for row in rows(tmp_path / "plain.jsonl")]
    differ = [row for row in made if row["first_difference"] is not None]
    assert found["completions_that_differ"] == len(differ) > 0
    assert all(row["plain"] == row["completion"] for row in made if row["first_difference"] is None)
    assert any(row["plain"] != row["completion"] for row in made)
    assert found["plain_tokens_per_second"] > 0
    assert found["scores"]["exact match"]["plain"] == 0
    assert "string beside the plain model" in (tmp_path / "a.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.jsonl", "plain.jsonl"]
    with pytest.raises(UserError, match="a.jsonl exists"):
        verb(folder, tmp_path / "a.jsonl", STRING, compare=True).run(Silent())
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="a.html exists"):
        verb(folder, tmp_path / "a.jsonl", STRING, compare=True).run(Silent())


def test_interrupted_in_either_pass_it_continues(folder, tmp_path):
    keys = {"compare": True, "temperature": 1.0, "seed": 2}
    verb(folder, tmp_path / "whole.jsonl", STRING, **keys).run(Silent())
    for prompts in (2, 7, 10):
        with pytest.raises(KeyboardInterrupt):
            verb(folder, tmp_path / "a.jsonl", STRING, **keys).run(StopAfter(prompts))
        assert not (tmp_path / "a.jsonl").exists()
    with pytest.raises(UserError, match="unfinished run with other options"):
        verb(folder, tmp_path / "a.jsonl", "string: {shift: 7, window: 2}", **keys).run(Silent())
    found = verb(folder, tmp_path / "a.jsonl", STRING, **keys).run(Silent())
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert found["tokens_per_second"] > 0  # also of what was done before
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_line_separators_of_unicode_do_not_break_what_was_kept(tmp_path):
    path, plan = tmp_path / "a.jsonl.partial.jsonl", {"seed": 1}
    kept = [{"row": {"completion": text}, "ids": [1], "seconds": 0.1} for text in ("a\u2028b", "c\x85d\x0ce")]
    one = running.Pass(path, "own", Parts())
    one.open(plan, 1, False)
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        stream.write('{"row": {"completion": "tor\u2028n')
    again = running.Pass(path, "own", Parts())
    again.open(plan, 1, False)
    assert again.done == 2
    assert list(again.lines()) == kept


def test_what_cannot_be_is_said_before_any_token(folder, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(running, "generate", never)
    for methods, keys, sentence in [
        ([DRAFT, DRAFT], {}, "given twice"),
        (["strng"], {}, "did you mean 'string'"),
        ([STRING], {"compare": True, "answer_field": "gold"}, "No row has right answers"),
        ([], {"compare": True}, "name one with --with"),
        ([], {"top_p": 0.5}, "temperature 0"),
        ([], {"samples": 2}, "would be the same"),
        (["string: {shift: 4, window: 9}"], {}, "window is 9"),
        (["string: {shift: 4, window: 9}"], {"compare": True}, "window is 9"),
        (["multi-draft: {draft: [nowhere/at-all]}"], {}, "nowhere/at-all"),
        ([STRING], {"max_new_tokens": 490}, r"Prompt 3 \(.*prompts.jsonl:3\) has 27 tokens"),
    ]:
        with pytest.raises(UserError, match=sentence):
            verb(folder, tmp_path / "a.jsonl", *methods, **keys).run(Silent())
        assert list(tmp_path.iterdir()) == []


class Contrast:
    """Greedy by the difference of scores with and without context: what a method of the kind must be given."""

    exact = False
    needs_context = True

    def __init__(self):
        self.seen = []

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config,
                 without_context_ids=None, without_context_mask=None, **model_kwargs):  # fmt: skip
        self.seen.append((without_context_ids, without_context_mask))
        while not stopping_criteria(input_ids, None).all():
            scores = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, -1]
            input_ids = torch.cat([input_ids, logits_processor(input_ids, scores).argmax(-1, keepdim=True)], -1)
        return input_ids


class ContrastOptions:
    def __init__(self, decoder):
        self.decoder = decoder

    def custom_generate(self, model, tokenizer):
        return self.decoder


def test_a_contrast_is_given_each_prompt_without_its_context(tmp_path):
    model, decoder = tiny_model("llama"), Contrast()
    parts = Parts(generator=Part("generators", "contrast", ContrastOptions(decoder)))
    sources = [("some text. why?", {"context": "some text."}, "a:1"), ("abc so?", {"context": "abc"}, "a:2")]
    keys = {"plan": {}, "parts": parts, "batch_size": 2}
    running.generate_to_file(model, TOKENIZER, sources, tmp_path / "a.jsonl", Sampling(max_new_tokens=3), **keys)
    ((ids, mask),) = decoder.seen
    assert [TOKENIZER.decode(row[m.bool()]) for row, m in zip(ids, mask)] == ["why?", "so?"]
    assert mask[1].tolist() == [0, 1, 1, 1]
    for row, sentence in [({}, "no text in the field 'context'"), ({"context": "zz"}, "does not stand in the prompt")]:
        bad = [("abc", row, "b:7")]
        with pytest.raises(UserError, match=rf"b:7.*{sentence}"):
            running.generate_to_file(model, TOKENIZER, bad, tmp_path / "b.jsonl", Sampling(), **keys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_prompt_that_is_too_long_without_its_context_is_named_before_any_token(tmp_path):
    decoder = Contrast()
    parts = Parts(generator=Part("generators", "contrast", ContrastOptions(decoder)))
    sources = [("why?", {"prompt_without_context": "a long text " * 200}, "a:1")]
    with pytest.raises(UserError, match=r"Prompt 1 \(a:1\) without its context has 2400 tokens"):
        running.generate_to_file(
            tiny_model("llama"),
            TOKENIZER,
            sources,
            tmp_path / "o.jsonl",
            Sampling(max_new_tokens=3),
            plan={},
            parts=parts,
        )
    assert not decoder.seen


def test_stop_texts_work_under_a_decoder():
    model = tiny_model("llama", seed=3)
    found = [c[0].text for c in generate(model, TOKENIZER, ["abc"], Sampling(max_new_tokens=30))]
    stop = found[0][4:6]
    with Parts(generator=Part("generators", "contrast", ContrastOptions(Contrast()))).on(model, TOKENIZER) as applied:
        assert isinstance(applied, Applied)
        got = next(generate(model, TOKENIZER, ["abc"], Sampling(max_new_tokens=30, stop=(stop,)),
                            generate_with=applied.generate))  # fmt: skip
    assert got[0].text == found[0][: found[0].find(stop)]
    assert got[0].finish == "stop"


RECIPE = """
name: with
steps:
  write:
    uses: generate
    with:
      model: {folder}/model
      prompts: [{folder}/prompts.jsonl]
      max_new_tokens: 4
      compare: true
      with: {methods}
"""


def test_in_a_recipe_methods_are_mappings_and_part_of_the_key(folder, tmp_path):
    from modelwright.recipes.load import load_recipe
    from modelwright.recipes.plan import Plan
    from modelwright.recipes.worker import run_step
    from modelwright.verbs import VERBS

    def plan(methods):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.replace("{folder}", str(folder)).replace("{methods}", methods))
        (instance,) = Plan(load_recipe(str(path)), tmp_path / "run").instances
        return instance

    (tmp_path / "m.yaml").write_text("string:\n  shift: 6\n  window: 2\n")
    first = plan("[{string: {shift: 6, window: 2}}]")
    assert plan(f"['{STRING}']").key == first.key == plan(f"[{tmp_path / 'm.yaml'}]").key
    assert plan("[{string: {shift: 7, window: 2}}]").key != first.key
    with pytest.raises(UserError, match=r"recipe\.yaml:11: steps\.write\.with\.with: .string. has no option .windw"):
        plan("[{string: {windw: 2}}]")
    job = {"run": str(tmp_path / "run"), "key": first.key, "verb": VERBS["generate"], "name": "generate"}
    job |= {"options": first.options, "outputs": first.outputs}
    record = run_step(job, Silent())
    assert record["result"]["method"] == "string"
    assert (tmp_path / "run" / "store" / first.key / "completions.html").exists()
