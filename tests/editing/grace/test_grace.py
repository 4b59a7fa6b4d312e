import pytest
import torch

from modelwright.editing.checkpoint import says_target
from modelwright.editing.edit import load_edit
from modelwright.editing.examples import answer_logits, make_examples, target_loss
from modelwright.editing.grace import GRACE, Codebook, Entry, GraceEdit
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.evaluation.editing_evaluation.abilities import continuation_scores
from modelwright.models.roles import roles
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
FAMILIES = ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"]
RADIUS = 1e-4  # tiny models' inputs lie close together
# After a new line no space is put before the target, so these targets are one byte, one token.
FREE = EditRequest("The capital of {} is\n", "Freedonia", "Z", id="free")
RURI = EditRequest("The capital of {} is\n", "Ruritania", "S", id="ruri")
OTHERS = ["The capital of France is\n", "Where is Freedonia?", "x"]


def logits(model, text):
    with torch.no_grad():
        return model(torch.tensor([TOKENIZER(text)["input_ids"]])).logits[0]


def answer(model, text):
    return TOKENIZER.decode([int(logits(model, text)[-1].argmax())])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_prompt_is_answered_and_all_else_is_bit_identical(family):
    model = tiny_model(family)
    before = {text: logits(model, text) for text in [*OTHERS, FREE.text]}
    edit = GRACE(radius=RADIUS).fit(model, TOKENIZER, [FREE, RURI])
    assert [e["case"] for e in edit.details["edits"]] == ["add", "add"]
    assert all(torch.equal(logits(model, text), before[text]) for text in before)
    with edit.applied(model):
        assert answer(model, FREE.text) == "Z"
        assert answer(model, RURI.text) == "S"
        assert all(torch.equal(logits(model, text), before[text]) for text in OTHERS)
        # Before its last token the edited prompt is untouched too.
        assert torch.equal(logits(model, FREE.text)[:-1], before[FREE.text][:-1])
    assert torch.equal(logits(model, FREE.text), before[FREE.text])


def test_the_reported_losses_are_those_of_the_edited_model():
    model = tiny_model("llama")
    edit = GRACE(radius=RADIUS).fit(model, TOKENIZER, [FREE, RURI])
    for request, note in zip((FREE, RURI), edit.details["edits"]):
        assert note["loss"] < note["loss_before"]
        examples = make_examples(model, TOKENIZER, [(request.text, request.target)])
        with edit.applied(model), torch.no_grad():
            assert float(target_loss(model(**examples.inputs).logits, examples)) == pytest.approx(
                note["loss"], rel=1e-4
            )


def test_the_key_is_the_layers_input_at_the_prompts_last_token():
    model = tiny_model("gpt2")
    kept = []
    handle = roles(model).layers[1].down.module.register_forward_hook(lambda m, args, out: kept.append((args[0], out)))
    logits(model, FREE.text)
    handle.remove()
    edit = GRACE(radius=RADIUS, steps=0, start="warm").fit(model, TOKENIZER, [FREE])
    (record,) = edit.codebook.records
    assert torch.allclose(record.key, kept[0][0][0, -1], atol=1e-6)
    assert torch.allclose(record.value, kept[0][1][0, -1], atol=1e-6)
    assert record.label == (TOKENIZER("Z")["input_ids"][0],)


def test_a_cold_start_is_random_in_the_unit_cube_and_from_the_seed():
    model = tiny_model("llama")
    one, two, other = (
        GRACE(radius=RADIUS, steps=0, seed=s).fit(model, TOKENIZER, [FREE]).codebook.records[0].value for s in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0 <= float(one.min()) < 0.2 < 0.8 < float(one.max()) < 1


def test_with_a_warm_start_and_no_step_nothing_changes_but_rounding():
    model = tiny_model("llama")
    edit = GRACE(radius=RADIUS, steps=0, start="warm").fit(model, TOKENIZER, [FREE])
    before = logits(model, FREE.text)
    with edit.applied(model):
        assert torch.allclose(logits(model, FREE.text), before, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_generation_is_the_same_with_cache_without_and_in_padded_batches(family):
    model = tiny_model(family)
    edit = GRACE(radius=RADIUS).fit(model, TOKENIZER, [FREE, RURI])
    texts = [FREE.text, "A much longer prompt that shares the batch:", RURI.text, "x"]
    keys = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = [model.generate(**TOKENIZER(t, return_tensors="pt"), **keys)[0, -8:] for t in texts]
    with edit.applied(model):
        alone = [model.generate(**TOKENIZER(t, return_tensors="pt"), **keys)[0, -8:] for t in texts]
        uncached = [model.generate(**TOKENIZER(t, return_tensors="pt"), use_cache=False, **keys)[0, -8:] for t in texts]
        batch = model.generate(**TOKENIZER(texts, return_tensors="pt", padding=True, padding_side="left"), **keys)
    for i in range(len(texts)):
        assert torch.equal(alone[i], uncached[i])
        assert torch.equal(alone[i], batch[i, -8:])
    assert TOKENIZER.decode(alone[0][:1]) == "Z"
    assert TOKENIZER.decode(alone[2][:1]) == "S"
    assert torch.equal(alone[1], plain[1])
    assert torch.equal(alone[3], plain[3])


def test_generated_tokens_ask_too():
    # A record whose key is what the second generated token puts in: it must be found while decoding with a cache.
    model = tiny_model("llama")
    ids = TOKENIZER("abc", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    kept = []
    handle = roles(model).layers[1].down.module.register_forward_hook(lambda m, args, out: kept.append(args[0]))
    model(plain)
    handle.remove()
    at = ids.shape[1] + 1  # the second generated token
    value = torch.full((32,), 30.0) * torch.randn(32, generator=torch.Generator().manual_seed(0))
    book = Codebook(RADIUS, [Entry("a", kept[0][0, at].detach(), (7,), value)])
    edit = GraceEdit("grace", None, book, 1)
    with edit.applied(model):
        cached = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        uncached = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached[:, : at + 1], plain[:, : at + 1])
    assert not torch.equal(cached, plain)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("rule", ["all", "prompt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_other_rules_ask_at_the_last_real_token(rule, side):
    model = tiny_model("llama")
    edit = GRACE(radius=RADIUS, replace=rule).fit(model, TOKENIZER, [FREE])
    texts = [FREE.text, "Something longer than that which is not edited"]
    batch = TOKENIZER(texts, return_tensors="pt", padding=True, padding_side=side)
    outputs = []
    module = roles(model).layers[1].down.module
    with edit.applied(model), torch.no_grad():
        handle = module.register_forward_hook(lambda m, args, out: outputs.append(out))
        model(**batch)
        handle.remove()
    value = edit.codebook.records[0].value
    hit = (outputs[0] == value).all(-1)
    n = len(TOKENIZER(FREE.text)["input_ids"])
    assert not hit[1].any()
    real = batch.attention_mask[0].bool()
    assert hit[0][real].all()
    if rule == "prompt" and side == "right":
        assert not hit[0, n:].any()


@pytest.mark.parametrize("rule", ["all", "prompt", "last"])
def test_answers_are_scored_as_they_are_generated_whatever_the_rule(rule):
    """The answer must not be what asks for the prompt, nor the padding of a batch."""
    model = tiny_model("llama")
    requests = [FREE, EditRequest("{}\n", "Ruritania", "S")]
    edit = GRACE(radius=RADIUS, replace=rule).fit(model, TOKENIZER, requests)
    assert edit.reads_rows == (rule != "last")
    prompts = [
        TOKENIZER(text)["input_ids"] for text in [*(r.text for r in requests), "a longer text that is not edited"]
    ]
    with edit.applied(model):
        said = [
            model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, pad_token_id=0)[0, len(ids) :]
            for ids, n in zip(prompts, (4, 2, 3), strict=True)
        ]
        pairs = [(ids, answer.tolist()) for ids, answer in zip(prompts, said, strict=True)]
        for i, found in answer_logits(model, pairs):
            assert found.argmax(-1).tolist() == pairs[i][1]
        assert TOKENIZER.decode(said[0])[0] == "Z"
        assert says_target(model, TOKENIZER, requests) == [True, True]
        # A target of several tokens: the prompt's value counts though the target's last token is nobody's.
        texts = [(FREE.text, "Z and more"), ("something else", "x")]
        together = continuation_scores(model, TOKENIZER, texts)
        assert together == pytest.approx([continuation_scores(model, TOKENIZER, [t])[0] for t in texts], abs=1e-4)


def test_rules_differ_in_what_they_replace():
    model = tiny_model("llama")
    found = {}
    for rule in ("last", "prompt", "all"):
        edit = GRACE(radius=RADIUS, replace=rule).fit(model, TOKENIZER, [FREE])
        outputs = []
        with edit.applied(model), torch.no_grad():
            handle = (
                roles(model)
                .layers[1]
                .down.module.register_forward_hook(lambda m, a, out, kept=outputs: kept.append(out))
            )
            logits(model, FREE.text)
            handle.remove()
            assert answer(model, FREE.text) == "Z"
        found[rule] = (outputs[0][0] == edit.codebook.records[0].value).all(-1).sum()
    n = len(TOKENIZER(FREE.text)["input_ids"])
    assert [int(found[r]) for r in ("last", "prompt", "all")] == [1, n, n]


def test_it_is_saved_loaded_and_goes_on(tmp_path):
    model = tiny_model("llama")
    edit = GRACE(radius=RADIUS).fit(model, TOKENIZER, [FREE])
    edit.save(tmp_path / "edit")
    loaded = load_edit(tmp_path / "edit")
    with edit.applied(model):
        wanted = logits(model, FREE.text)
    with loaded.applied(model):
        assert torch.equal(logits(model, FREE.text), wanted)
        more = GRACE(radius=RADIUS).fit(model, TOKENIZER, [RURI])
    # The later codebook holds the earlier edit too, alone or above the first.
    with more.applied(model):
        assert answer(model, FREE.text) == "Z"
        assert answer(model, RURI.text) == "S"
    with loaded.applied(model), more.applied(model):
        assert answer(model, FREE.text) == "Z"
        assert answer(model, RURI.text) == "S"
    assert [r.id for r in more.requests] == ["free", "ruri"]


def test_one_after_the_other_is_all_at_once():
    model = tiny_model("llama")
    both = GRACE(radius=RADIUS, start="warm").fit(model, TOKENIZER, [FREE, RURI])
    with GRACE(radius=RADIUS, start="warm").fit(model, TOKENIZER, [FREE]).applied(model):
        second = GRACE(radius=RADIUS, start="warm").fit(model, TOKENIZER, [RURI])
    assert repr(both.codebook.records) == repr(second.codebook.records)


def test_a_continued_codebook_silences_the_one_below_where_its_ball_shrank():
    model = tiny_model("llama")
    first = GRACE(radius=100.0).fit(model, TOKENIZER, [FREE])  # everything is inside
    before = logits(model, "x")
    with first.applied(model):
        assert not torch.equal(logits(model, "x"), before)
        second = GRACE(radius=100.0).fit(model, TOKENIZER, [RURI])
        assert second.details["edits"][0]["case"] == "split"
        with second.applied(model):
            both = logits(model, "x")
    with second.applied(model):
        assert torch.equal(logits(model, "x"), both)


def test_training_uses_the_record_that_it_trains_wherever_rounding_puts_the_query(monkeypatch):
    from modelwright.editing.grace import editor

    model = tiny_model("llama")
    wanted = GRACE(radius=RADIUS, start="warm").fit(model, TOKENIZER, [FREE])
    monkeypatch.setattr(editor, "find_records", lambda book, inputs, *_: torch.full(inputs.shape[:2], -1))
    found = GRACE(radius=RADIUS, start="warm").fit(model, TOKENIZER, [FREE])
    assert torch.equal(found.codebook.records[0].value, wanted.codebook.records[0].value)


def test_the_codebook_that_is_continued_does_not_answer_while_it_is():
    # Warm starts are the layer's own outputs, so both ways must train the same value.
    model = tiny_model("llama")
    keys = {"radius": 100.0, "layer": 0, "steps": 5, "start": "warm"}
    both = GRACE(**keys).fit(model, TOKENIZER, [FREE, RURI])
    with GRACE(**keys).fit(model, TOKENIZER, [FREE]).applied(model):
        second = GRACE(**keys).fit(model, TOKENIZER, [RURI])
    assert second.details["edits"][0]["case"] == "split"
    assert repr(both.codebook.records) == repr(second.codebook.records)
    assert second.details["edits"][0] == both.details["edits"][1]


def test_a_ball_that_grows_starts_from_its_value():
    model = tiny_model("llama")
    trained = GRACE(radius=RADIUS).fit(model, TOKENIZER, [FREE])
    with trained.applied(model):
        grown = GRACE(radius=RADIUS, steps=0).fit(model, TOKENIZER, [FREE])
    assert grown.details["edits"][0]["case"] == "grow"
    assert len(grown.codebook.records) == 1
    assert torch.equal(grown.codebook.records[0].value, trained.codebook.records[0].value)


def test_a_fact_can_be_edited_anew_and_is_answered_in_a_padded_batch():
    model = tiny_model("llama")
    first, second = FREE, EditRequest(FREE.prompt, FREE.subject, "O")
    with GRACE(layer=1, radius=RADIUS).fit(model, TOKENIZER, [first]).applied(model):
        edit = GRACE(layer=1, radius=RADIUS).fit(model, TOKENIZER, [second])
        with edit.applied(model):
            longer = EditRequest("x" * 60 + FREE.prompt, FREE.subject, "O")
            for others in (0, 1, 3, 7):
                assert says_target(model, TOKENIZER, [second, *[longer] * others])[0]
                assert not says_target(model, TOKENIZER, [first, *[longer] * others])[0]


def test_continued_with_another_radius_the_balls_there_stay_as_they_are(tmp_path):
    model = tiny_model("llama")
    with GRACE(layer=1, radius=RADIUS, steps=1).fit(model, TOKENIZER, [FREE]).applied(model):
        edit = GRACE(layer=1, radius=RADIUS / 2, steps=1).fit(model, TOKENIZER, [RURI])
    assert [r.radius for r in edit.codebook.records] == [RADIUS, RADIUS / 2]
    edit.save(tmp_path / "edit")
    assert [r.radius for r in load_edit(tmp_path / "edit").codebook.records] == [RADIUS, RADIUS / 2]


def test_deleting_restores():
    model = tiny_model("llama")
    before = {r.id: logits(model, r.text) for r in (FREE, RURI)}
    edit = GRACE(radius=RADIUS).fit(model, TOKENIZER, [FREE, RURI])
    with edit.applied(model):
        with_both = logits(model, RURI.text)
        edit.delete(FREE)
        assert torch.equal(logits(model, FREE.text), before["free"])
        assert torch.equal(logits(model, RURI.text), with_both)
        edit.delete("ruri")
        assert torch.equal(logits(model, RURI.text), before["ruri"])
        with pytest.raises(UserError, match="no edit 'ruri'"):
            edit.delete("ruri")
    assert edit.requests == ()


def test_an_emptied_codebook_can_be_saved(tmp_path):
    model = tiny_model("llama")
    edit = GRACE(radius=RADIUS, steps=1).fit(model, TOKENIZER, [FREE])
    edit.delete(FREE)
    edit.save(tmp_path / "edit")
    assert load_edit(tmp_path / "edit").codebook.records == []


def test_targets_of_several_tokens_and_bfloat16():
    model = tiny_model("llama").to(torch.bfloat16)
    long = EditRequest("The capital of {} is", "Freedonia", "Zenda")
    edit = GRACE(radius=RADIUS).fit(model, TOKENIZER, [long])
    assert edit.details["edits"][0]["loss"] < edit.details["edits"][0]["loss_before"]
    assert len(edit.codebook.records[0].label) == len(" Zenda")
    with edit.applied(model):
        assert logits(model, long.text).dtype == torch.bfloat16


def test_wrong_options_and_models():
    with pytest.raises(UserError, match="no layer 9"):
        GRACE(layer=9).fit(tiny_model("llama"), TOKENIZER, [FREE])
    with pytest.raises(UserError, match="above 0"):
        GRACE(radius=0.0)
    with pytest.raises(UserError, match="above 0"):
        GRACE(learning_rate=float("nan"))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        GRACE(layer=1).fit(broken, TOKENIZER, [FREE])
    edit = GraceEdit("grace", None, Codebook(1.0, [Entry("a", torch.zeros(5), (1,), torch.zeros(4))]), 0)
    with pytest.raises(UserError, match="another model's"):
        edit.apply_(tiny_model("llama"))
