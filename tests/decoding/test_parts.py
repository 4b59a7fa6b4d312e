"""Methods named by files and lines of YAML, and applied together."""

import json

import pytest
import torch

from modelwright.decoding.parts import Parts, read_parts
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_yaml_in_a_line_may_be_longer_than_the_name_of_a_file():
    heads = [f"{layer}-{head}" for layer in range(20) for head in range(20)]
    parts = read_parts([f"decore: {{head: [{', '.join(heads)}]}}"])
    assert len(parts.generator.options.head) == 400


def test_a_name_a_line_a_mapping_and_files_say_the_same(tmp_path):
    (tmp_path / "m.yaml").write_text("string:\n  window: 64\n  shift: 100\n")
    (tmp_path / "m.json").write_text(json.dumps({"string": {"window": 64, "shift": 100}}))
    ways = ["string: {window: 64, shift: 100}", {"string": {"window": "64", "shift": 100}}, tmp_path / "m.yaml",
            str(tmp_path / "m.json")]  # fmt: skip
    first, *others = [read_parts([way]) for way in ways]
    assert all(other == first for other in others)
    assert first.contexts[0].options.window == 64
    assert isinstance(first.contexts[0].options.shift, int)
    assert read_parts(["string"]).contexts[0].options.window == 128


def test_order_and_name():
    parts = read_parts(["multi_draft: {prompt_lookup: true}", "string"])
    assert [p.name for p in parts.contexts] == ["string"]
    assert parts.generator.name == "multi-draft"
    assert parts.name == "multi-draft under string"
    assert read_parts([]) == Parts()
    assert Parts().name == "plain"
    assert read_parts([{"string": None, "multi-draft": {"prompt_lookup": True}}]).name == parts.name


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["strng"], "'strng' is no decoding method: did you mean 'string'"),
        (["string: {windw: 3}"], "no option 'windw': did you mean 'window'"),
        (["string: {window: wide}"], "option 'window' of 'string' must be a whole number, not 'wide'"),
        (["string: 64"], "must be a mapping"),
        (["string:{window: 64}"], "."),
        (["string", "string: {window: 3}"], "'string' is given twice"),
        (["string: {window: [}"], "not valid YAML"),
        (["my-model"], "my-model is a model's folder, not a decoding method: give it with --model."),
        (["no-such.yaml"], "no-such.yaml does not exist"),
        (["3"], "must name a method"),
        ([""], "must name a method"),
        (["multi-draft: {verifier: null}"], "must be a text"),
        (["multi-draft: {draft: 5}"], "must be a list"),
    ],
)
def test_what_is_wrong_is_one_sentence(given, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        read_parts(given)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "m.yaml").write_text("string:\n  window: [\n")
    with pytest.raises(UserError, match=r"m\.yaml, line 3"):
        read_parts([tmp_path / "m.yaml"])


def test_two_that_choose_tokens_are_refused(monkeypatch):
    from modelwright import catalog

    options = catalog.load("generators", "multi-draft")
    provided, load = catalog.provided, catalog.load
    more = {"other": "elsewhere:Other"}
    monkeypatch.setattr(catalog, "provided", lambda k: provided(k) | (more if k == "generators" else {}))
    monkeypatch.setattr(catalog, "load", lambda k, n: options if n == "other" else load(k, n))
    with pytest.raises(UserError, match="'multi-draft' and 'other' both choose the tokens"):
        read_parts(["multi-draft", "other"])


def test_the_identity_follows_options_and_contents(tmp_path):
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text("{}")
    given = [f"multi-draft: {{draft: ['{tmp_path / 'draft'}'], layout: rows}}"]
    before = read_parts(given).identity()
    assert json.loads(json.dumps(before)) == before
    assert read_parts([given[0].replace("rows", "tree")]).identity() == before  # how, not what
    assert read_parts([given[0].replace("layout: rows", "num_drafts: 3")]).identity() != before
    (tmp_path / "draft" / "config.json").write_text("{ }")
    assert read_parts(given).identity() != before


def test_methods_apply_inside_the_block_and_leave_no_trace(model, tokenizer):
    ids = tokenizer("a long text to look at, " * 4, return_tensors="pt")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain, logits = model.generate(**ids, max_new_tokens=12, do_sample=False), model(**ids).logits
    with read_parts(["string: {shift: 20, window: 4}", "multi-draft: {prompt_lookup: true}"]).on(
        model, tokenizer
    ) as on:
        inside = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(on.generate(**ids, max_new_tokens=12, do_sample=False), inside)
        assert not torch.equal(model(**ids).logits, logits)
        assert torch.equal(on.log_probs(ids.input_ids, ids.attention_mask), model(**ids).logits.log_softmax(-1))
        assert on.decoder.stats.tokens == 12
        assert not on.needs_context
    assert torch.equal(model(**ids).logits, logits)
    assert torch.equal(model.generate(**ids, max_new_tokens=12, do_sample=False), plain)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_does_not_go_with_the_model_is_said_at_the_door(tokenizer):
    gpt2 = tiny_model("gpt2")
    with pytest.raises(UserError, match="rotary"), read_parts(["string", "multi-draft"]).on(gpt2, tokenizer):
        raise AssertionError
    with pytest.raises(UserError, match="nothing to draft with"), read_parts(["multi-draft"]).on(gpt2, tokenizer):
        raise AssertionError
    assert torch.isfinite(gpt2(torch.tensor([[5, 6]])).logits).all()


def test_a_decoder_that_is_not_exact_scores_by_its_own_law(model, tokenizer):
    from modelwright.decoding.parts import Applied

    class Uniform:
        exact = False

        def next_token_log_probs(self, model, input_ids, attention_mask):
            return torch.full((*input_ids.shape, 4), -(4.0**0.5))

    class Silent:
        exact = False

    ids = torch.tensor([[5, 6, 7]])
    assert Applied(model, tokenizer, Uniform()).log_probs(ids, ids).shape == (1, 3, 4)
    with pytest.raises(UserError, match="Silent only generates"):
        Applied(model, tokenizer, Silent()).log_probs(ids, ids)
