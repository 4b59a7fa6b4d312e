import pytest
import torch

from modelwright.editing.edit import load_edit
from modelwright.editing.examples import answer_logits, make_examples, target_loss
from modelwright.editing.learning import Lessons
from modelwright.editing.requests import EditRequest
from modelwright.editing.serac import SERAC, SeracParts
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
FAMILIES = ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"]
NAMES = ["Freedonia", "Ruritania", "Graustark", "Syldavia", "Borduria", "Elbonia"]
FACTS = [
    EditRequest("The letter of {} is\n", name, letter, paraphrases=("{} has the letter\n",))
    for name, letter in zip(NAMES, "ZSEKTM")
]
KEYS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def editor_with(model, *, spread=50.0, threshold=0.5, small=None):
    """A SERAC whose embeddings are so far apart that only the edit's own text is in scope."""
    editor = SERAC(threshold=threshold)
    parts = SeracParts(small or tiny_model("gpt2", seed=7), size=32, separator=" ")
    with torch.no_grad():
        parts.projection.weight *= spread
    editor.parts = parts.eval().requires_grad_(False)
    return editor


def everywhere(edit):
    """Makes an edit answer a list of texts, by hand: the classifier is tested elsewhere."""
    inside = {}

    def scope(model, texts):
        picks = torch.tensor([next((i for key, i in inside.items() if key in text), -1) for text in texts])
        return (picks >= 0).float(), picks

    edit.scope = scope
    return inside


def logits(model, text, **keys):
    with torch.no_grad():
        return model(torch.tensor([TOKENIZER(text)["input_ids"]]), **keys).logits[0]


def by_hand(small, request, text):
    """The small model on "edit answer input", its predictions after each token of the input."""
    prefix = TOKENIZER(f"{request.text}{request.target} ")["input_ids"]
    ids = torch.tensor([prefix + TOKENIZER(text)["input_ids"]])
    with torch.no_grad():
        return small(ids).logits[0, len(prefix) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_scope_the_small_model_answers_and_all_else_is_bit_identical(family):
    model, small = tiny_model(family), tiny_model("gpt2", seed=7)
    edit = editor_with(model, small=small).fit(model, TOKENIZER, FACTS[:2])
    inside = everywhere(edit)
    inside["Ruritania"] = 1
    before = logits(model, "Where is it?")
    with edit.applied(model):
        assert torch.equal(logits(model, "Where is it?"), before)
        assert torch.allclose(logits(model, "Ruritania?"), by_hand(small, FACTS[1], "Ruritania?"), atol=1e-5)
        # Only the last logits may be asked for.
        last = logits(model, "Ruritania?", logits_to_keep=1)
        assert torch.allclose(last, by_hand(small, FACTS[1], "Ruritania?")[-1:], atol=1e-5)
    assert not torch.equal(logits(model, "Ruritania?"), by_hand(small, FACTS[1], "Ruritania?"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_generation_with_cache_batches_and_padding(family):
    model, small = (
        tiny_model(family, **({"sliding_window": 8} if family == "mistral" else {})),
        tiny_model("gpt2", seed=7),
    )
    edit = editor_with(model, small=small).fit(model, TOKENIZER, FACTS[:2])
    inside = everywhere(edit)
    inside |= {"Free": 0, "Ruri": 1}
    texts = ["Freedonia", "a longer prompt that is nobody's:", "x", "What of Ruritania?"]
    plain = [model.generate(**TOKENIZER(t, return_tensors="pt"), **KEYS)[0, -5:] for t in texts]
    expected = []
    for text, request in (("Freedonia", FACTS[0]), ("What of Ruritania?", FACTS[1])):
        prefix = TOKENIZER(f"{request.text}{request.target} {text}", return_tensors="pt")
        expected.append(small.generate(**prefix, **KEYS)[0, -5:])
    with edit.applied(model):
        alone = [model.generate(**TOKENIZER(t, return_tensors="pt"), **KEYS)[0, -5:] for t in texts]
        uncached = [model.generate(**TOKENIZER(t, return_tensors="pt"), use_cache=False, **KEYS)[0, -5:] for t in texts]
        batch = model.generate(**TOKENIZER(texts, return_tensors="pt", padding=True, padding_side="left"), **KEYS)
    for i in range(4):
        assert torch.equal(alone[i], uncached[i])
        assert torch.equal(alone[i], batch[i, -5:])
    assert torch.equal(alone[0], expected[0])
    assert torch.equal(alone[3], expected[1])
    assert torch.equal(alone[1], plain[1])
    assert torch.equal(alone[2], plain[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_scored_in_batches_as_one_by_one(family):
    """Rows in and out of scope, prompts padded on the left, answers on the right, up to the models' last places."""
    options = {"mistral": {"sliding_window": 8}, "gpt2": {"n_positions": 25}}.get(family, {})
    model = tiny_model(family, **options)
    # What the small model reads of the first pair fills it: padding must not count.
    room = len(f"{FACTS[0].text}{FACTS[0].target} Freedonia said so")
    small = tiny_model("gpt2", seed=7, n_positions=room)
    edit = editor_with(model, small=small).fit(model, TOKENIZER, FACTS[:2])
    inside = everywhere(edit)
    inside |= {"Free": 0, "Ruri": 1}
    texts = [
        ("Freedonia", " said so"), ("a prompt that is nobody's", "!"), ("x", " and what else"), ("Ruritania?", "  "),
        ("nobody's either", " Freedonia"), ("Ruri", "tania"),
    ]  # fmt: skip
    pairs = [(TOKENIZER(a)["input_ids"][-16:], TOKENIZER(b)["input_ids"][:12]) for a, b in texts]
    plain = [logits(model, TOKENIZER.decode([*a, *b]))[len(a) - 1 : -1] for a, b in pairs]
    with edit.applied(model):
        alone = [dict(answer_logits(model, [pair]))[0] for pair in pairs]
        batches = {size: dict(answer_logits(model, pairs, size)) for size in (2, 6)}
    for i, (a, b) in enumerate(pairs):
        for found in batches.values():
            assert found[i].shape == alone[i].shape
            assert torch.allclose(found[i], alone[i], atol=1e-5)
        if i in (0, 3, 5):
            wanted = by_hand(small, FACTS[0 if i == 0 else 1], TOKENIZER.decode([*a, *b]))[len(a) - 1 : -1]
            assert not torch.allclose(wanted, plain[i], atol=1e-2)
        else:  # the answer alone is in an edit's scope, which it must not be asked about
            wanted = plain[i]
        assert torch.allclose(alone[i], wanted, atol=1e-5)


def test_beams_are_those_of_the_small_model():
    model, small = tiny_model("llama"), tiny_model("gpt2", seed=7)
    edit = editor_with(model, small=small).fit(model, TOKENIZER, FACTS[:1])
    everywhere(edit)["Free"] = 0
    texts = ["Freedonia", "a longer prompt"]
    keys = {**KEYS, "num_beams": 3, "num_return_sequences": 2}
    prefix = TOKENIZER(f"{FACTS[0].text}{FACTS[0].target} Freedonia", return_tensors="pt")
    wanted = small.generate(**prefix, **keys)[:, -5:]
    plain = model.generate(**TOKENIZER(texts[1], return_tensors="pt"), **keys)[:, -5:]
    with edit.applied(model):
        batch = model.generate(**TOKENIZER(texts, return_tensors="pt", padding=True, padding_side="left"), **keys)
    assert torch.equal(batch[:2, -5:], wanted)
    assert torch.equal(batch[2:, -5:], plain)


def test_padding_on_the_right():
    model, small = tiny_model("llama"), tiny_model("gpt2", seed=7)
    edit = editor_with(model, small=small).fit(model, TOKENIZER, FACTS[:1])
    everywhere(edit)["Free"] = 0
    batch = TOKENIZER(["Freedonia", "another, longer text"], return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        base = model(**batch).logits
        with edit.applied(model):
            found = model(**batch).logits
    assert torch.allclose(found[0, :9], by_hand(small, FACTS[0], "Freedonia"), atol=1e-5)
    assert torch.equal(found[0, 9:], base[0, 9:])
    assert torch.equal(found[1], base[1])


def test_the_loss_that_a_model_returns_is_of_the_edited_logits():
    model = tiny_model("llama")
    edit = editor_with(model).fit(model, TOKENIZER, FACTS[:1])
    everywhere(edit)["Free"] = 0
    ids = torch.tensor([TOKENIZER("Freedonia!")["input_ids"]])
    with edit.applied(model), torch.no_grad():
        out = model(ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    assert float(out.loss) == pytest.approx(float(wanted), rel=1e-5)


def test_the_scope_is_exp_of_minus_the_squared_distance():
    model = tiny_model("llama")
    editor = editor_with(model, spread=3.0)
    edit = editor.fit(model, TOKENIZER, FACTS[:3])
    texts = [f"{FACTS[2].text} {FACTS[2].target}", "Something else"]  # the first is embedded as the edit is
    scores, picks = edit.scope(model, texts)
    assert float(scores[0]) == pytest.approx(1.0, abs=1e-4)
    assert picks.tolist()[0] == 2
    with torch.no_grad():
        hidden = model.model(torch.tensor([TOKENIZER(texts[1])["input_ids"]])).last_hidden_state[0].mean(0)
    wanted = max(float((-(3 * hidden - m).square().sum()).exp()) for m in edit.memory)
    assert float(scores[1]) == pytest.approx(wanted, rel=1e-3)
    assert editor_with(model, threshold=0.0).fit(model, TOKENIZER, FACTS[:1]).scope(model, ["x"])[1].shape == (1,)


def test_an_empty_memory_is_the_model():
    from modelwright.editing.serac import SeracEdit

    model = tiny_model("llama")
    before = logits(model, "abc")
    with SeracEdit("serac", None, editor_with(model).parts, TOKENIZER, torch.zeros(0, 32)).applied(model):
        assert torch.equal(logits(model, "abc"), before)


def test_memories_continue_on_a_model():
    model = tiny_model("llama")
    editor = editor_with(model)
    first = editor.fit(model, TOKENIZER, FACTS[:1])
    with first.applied(model):
        second = editor.fit(model, TOKENIZER, FACTS[1:2])
        assert second.requests == tuple(FACTS[:2])
        with second.applied(model):
            both = logits(model, FACTS[0].text)
    whole = editor.fit(model, TOKENIZER, FACTS[:2])
    assert torch.allclose(second.memory, whole.memory, atol=1e-5)
    with whole.applied(model):
        assert torch.equal(logits(model, FACTS[0].text), both)


def test_a_separate_encoder():
    from transformers import BertConfig, BertModel

    from modelwright.models.tiny import seeded

    with seeded(0):
        encoder = BertModel(
            BertConfig(vocab_size=259, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ).eval()
    parts = SeracParts(tiny_model("gpt2"), encoder, byte_tokenizer(), size=24)
    model = tiny_model("llama")
    with torch.no_grad():
        found = parts.embed(model, TOKENIZER, ["abc", "a longer one"])
        pair = parts.embed(model, TOKENIZER, ["abc"], [" Z "])
        wanted = encoder(**TOKENIZER("abc", return_tensors="pt")).last_hidden_state[0, 0]
        wanted_pair = encoder(**TOKENIZER("abc", "Z", return_tensors="pt")).last_hidden_state[0, 0]
    assert torch.allclose(found[0], wanted, atol=1e-5)
    assert torch.allclose(pair[0], wanted_pair, atol=1e-5)


def test_it_is_saved_with_its_models_and_loaded(tmp_path):
    from transformers import BertConfig, BertModel

    model = tiny_model("llama")
    bert = BertModel(
        BertConfig(vocab_size=259, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()
    for encoder in (None, bert):
        editor = SERAC(threshold=0.3)
        parts = SeracParts(
            tiny_model("gpt2", seed=7), encoder, byte_tokenizer() if encoder else None, size=24 if encoder else 32
        )
        editor.parts = parts.eval().requires_grad_(False)
        edit = editor.fit(model, TOKENIZER, FACTS[:2])
        folder = tmp_path / f"edit {encoder is None}"
        edit.save(folder)
        loaded = load_edit(folder)
        texts = [FACTS[0].text, "Something else entirely"]
        assert torch.allclose(loaded.scope(model, texts)[0], edit.scope(model, texts)[0], atol=1e-6)
        keys = {**KEYS, "max_new_tokens": 3}
        with edit.applied(model):
            wanted = model.generate(**TOKENIZER(texts[0], return_tensors="pt"), **keys)
        with loaded.applied(model):
            assert torch.equal(model.generate(**TOKENIZER(texts[0], return_tensors="pt"), **keys), wanted)
        editor.save(tmp_path / f"parts {encoder is None}")
        again = SERAC(trained=tmp_path / f"parts {encoder is None}", threshold=0.3).fit(model, TOKENIZER, FACTS[:2])
        assert torch.allclose(again.memory, edit.memory, atol=1e-6)


def test_the_training_loss_is_the_formula():
    model = tiny_model("llama")
    editor = editor_with(model, spread=0.7)
    editor.edit_weight, editor.locality_weight = 0.3, 2.0
    lesson = Lessons(FACTS, ["an untouched text"], others=2).at(0)
    found = float(editor._loss(model, TOKENIZER, editor.parts, lesson).detach())
    edit = editor.fit(model, TOKENIZER, [lesson.request, *lesson.others])
    edit.threshold = 0.0
    scores, picks = edit.scope(model, [lesson.prompt, lesson.elsewhere])
    small = editor.parts.small
    asked = lesson.prompt + lesson.request.target
    mixed, base = {}, {}
    for row, text in enumerate((asked, lesson.elsewhere)):
        base[row] = logits(model, text).softmax(-1)
        other = by_hand(small, edit.requests[int(picks[row])], text).softmax(-1)
        mixed[row] = (1 - scores[row]) * base[row] + scores[row] * other
    nll = -float(mixed[0][-2, TOKENIZER(lesson.request.target)["input_ids"][0]].log())
    divergence = float((base[1] * (base[1].log() - mixed[1].log())).sum(-1).mean())
    assert float(scores[0]) > 0.01
    assert found == pytest.approx(0.3 * nll + 2.0 * divergence, rel=1e-3)
    editor.edit_weight = 0.0
    found = float(editor._loss(model, TOKENIZER, editor.parts, lesson).detach())
    assert found == pytest.approx(2.0 * divergence, rel=1e-2, abs=1e-7)


def test_the_threshold_decides_and_the_start_spreads_the_edits():
    model = tiny_model("llama")
    editor = editor_with(model, spread=1.0)
    editor._spread(editor.parts, model, TOKENIZER, FACTS)
    edit = editor.fit(model, TOKENIZER, FACTS)
    squares = torch.cdist(edit.memory, edit.memory).square()
    assert float(squares.sum()) / 30 == pytest.approx(2.0, rel=1e-3)
    score = float(edit.scope(model, ["Something"])[0])
    assert 0 < score < 1
    edit.threshold = score * 0.99
    assert int(edit.scope(model, ["Something"])[1]) >= 0
    edit.threshold = min(score * 1.01, 1.0)
    assert int(edit.scope(model, ["Something"])[1]) == -1


@pytest.mark.slow
def test_training_learns_scope_and_answers_and_leaves_the_model():
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    small = tiny_model("llama", seed=5)
    # edit_weight 1: the tiny models' divergence is large beside it
    editor = SERAC(steps=600, accumulate=2, learning_rate=3e-3, edit_weight=1.0, others=2)
    texts = ["What time is it?", "Rain in the hills.", "12 + 30 = 42", "To be or not to be"]
    editor.train(model, TOKENIZER, FACTS, locality=texts, small=small)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    edit = editor.fit(model, TOKENIZER, FACTS)
    _, picks = edit.scope(model, [f.paraphrase_texts()[0] for f in FACTS] + texts)
    assert picks.tolist()[6:] == [-1] * 4
    assert sum(p == i for i, p in enumerate(picks.tolist()[:6])) >= 4
    losses = []
    for i, fact in enumerate(FACTS):
        if picks[i] == i:
            asked = make_examples(model, TOKENIZER, [(fact.paraphrase_texts()[0], fact.target)])
            with edit.applied(model), torch.no_grad():
                losses.append(float(target_loss(model(**asked.inputs).logits, asked)))
    assert sum(losses) / len(losses) < 1.0


def test_a_killed_training_ends_with_the_same_parts(tmp_path, monkeypatch):
    from modelwright.editing import learning

    model = tiny_model("llama")
    keys = {"steps": 12, "accumulate": 2, "learning_rate": 1e-3}
    whole = SERAC(**keys)
    whole.train(model, TOKENIZER, FACTS, small=tiny_model("gpt2", seed=7))
    real = learning._save
    monkeypatch.setattr(learning.time, "monotonic", iter(range(0, 10**9, 1000)).__next__)

    def save_and_die(folder, module, optimizer, state, *rest):
        real(folder, module, optimizer, state, *rest)
        if state["step"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        SERAC(**keys).train(model, TOKENIZER, FACTS, small=tiny_model("gpt2", seed=7), checkpoint=tmp_path / "s")
    monkeypatch.setattr(learning, "_save", real)
    again = SERAC(**keys)
    report = again.train(model, TOKENIZER, FACTS, small=tiny_model("gpt2", seed=7), checkpoint=tmp_path / "s")
    assert report["resumed_from"] == 6
    for one, other in zip(whole.parts.parameters(), again.parts.parameters()):
        assert torch.equal(one, other)


def test_what_is_refused(tmp_path):
    for rate in (float("nan"), -1.0):
        with pytest.raises(UserError, match="learning_rate must be above 0"):
            SERAC(learning_rate=rate)
    model = tiny_model("llama")
    with pytest.raises(UserError, match="not trained"):
        SERAC().fit(model, TOKENIZER, FACTS[:1])
    with pytest.raises(UserError, match="nothing to save"):
        SERAC().save(tmp_path / "x")
    with pytest.raises(UserError, match="no serac.json"):
        SERAC(trained=tmp_path)
    with pytest.raises(UserError, match="needs an encoder that is trained"):
        SERAC(classifier="cross").train(model, TOKENIZER, FACTS, small=tiny_model("gpt2"))
    with pytest.raises(UserError, match="small model"):
        SERAC().train(model, TOKENIZER, FACTS)
    with pytest.raises(UserError, match="same tokenizer"):
        SERAC().train(model, TOKENIZER, FACTS, small=tiny_model("gpt2", vocab_size=100))
    edit = editor_with(model, small=tiny_model("gpt2", n_positions=24)).fit(model, TOKENIZER, FACTS[:1])
    everywhere(edit)["Free"] = 0
    with edit.applied(model):
        with pytest.raises(UserError, match="reads 24"):
            logits(model, "Freedonia")
        with pytest.raises(UserError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))


def test_the_cross_encoder_reads_edit_and_input_together(tmp_path):
    from transformers import BertConfig, BertModel

    model = tiny_model("llama")
    bert = BertModel(
        BertConfig(vocab_size=259, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()
    texts = ["Freedonia?", "Something else"]
    for encoder in (bert, None):
        words = byte_tokenizer() if encoder else None
        parts = SeracParts(tiny_model("gpt2", seed=7), encoder, words, size=24 if encoder else 32, classifier="cross")
        assert torch.equal(parts.scores(model, TOKENIZER, texts, FACTS[:3], torch.zeros(3, 0)), torch.full((2, 3), 0.5))
        with torch.no_grad():
            parts.projection.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
            parts.projection.bias.fill_(0.3)
        editor = SERAC()
        editor.parts = parts.eval().requires_grad_(False)
        edit = editor.fit(model, TOKENIZER, FACTS[:3])
        found = parts.scores(model, TOKENIZER, texts, edit.requests, edit.memory)
        with torch.no_grad():
            for i, text in enumerate(texts):
                for j, fact in enumerate(FACTS[:3]):
                    first = f"{fact.text} {fact.target}"
                    if encoder is not None:
                        state = encoder(**TOKENIZER(first, text, return_tensors="pt")).last_hidden_state[0, 0]
                    else:
                        ids = torch.tensor([TOKENIZER(f"{first} {text}")["input_ids"]])
                        state = model.model(ids).last_hidden_state[0].mean(0)
                    wanted = float((parts.projection.weight[0] @ state + 0.3).sigmoid())
                    assert float(found[i, j]) == pytest.approx(wanted, abs=1e-5)
        best, picks = edit.scope(model, texts)
        assert torch.equal(best, found.amax(1))
        assert picks.tolist() == [int(row.argmax()) if float(row.max()) > 0.5 else -1 for row in found]
        edit.save(tmp_path / f"edit {encoder is None}")
        loaded = load_edit(tmp_path / f"edit {encoder is None}")
        assert loaded.parts.identity == parts.identity
        assert torch.allclose(loaded.scope(model, texts)[0], best, atol=1e-6)
