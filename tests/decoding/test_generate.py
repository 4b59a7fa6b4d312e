"""Generation: the same with and without cache, alone and in a batch, at once and resumed."""

import collections
import json
import math

import pytest
import torch

from modelwright import catalog
from modelwright.decoding.generate import GumbelDraw, Sampling, chat_prompt, generate, stream_seed
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.new import new_config, new_model
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.generate import Generate

TOKENIZER = byte_tokenizer()
PROMPTS = ["a", "some longer prompt", "", "middle 1"]
OURS = sorted(catalog.provided("architectures"))


def make(family):
    if family in FAMILIES:
        return tiny_model(family, seed=3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return new_model(new_config(family, sizes, TOKENIZER), seed=3).eval()


def texts(model, prompts, sampling, **keys):
    return [[c.text for c in row] for row in generate(model, TOKENIZER, prompts, sampling, **keys)]


@pytest.mark.parametrize("family", [*FAMILIES, *OURS])
def test_with_cache_as_without_and_in_a_batch_as_alone(family):
    model, sampling = make(family), Sampling(max_new_tokens=6)
    # Ends are ruled out, so that the plain loop below needs no rule for them.
    model.generation_config.eos_token_id = None
    batched = [c[0] for c in generate(model, TOKENIZER, PROMPTS, sampling, batch_size=4)]
    for prompt, completion in zip(PROMPTS, batched, strict=True):
        ids = TOKENIZER(prompt)["input_ids"] or [TOKENIZER.eos_token_id]
        plain = list(ids)
        with torch.no_grad():
            for _ in range(6):
                plain.append(int(model(torch.tensor([plain]), use_cache=False).logits[0, -1].argmax()))
        plain = plain[len(ids) :]
        if TOKENIZER.eos_token_id in plain:
            plain = plain[: plain.index(TOKENIZER.eos_token_id) + 1]
        assert completion.text == TOKENIZER.decode(plain, skip_special_tokens=True)


def test_samples_do_not_depend_on_the_batch_or_on_where_a_run_starts():
    model, sampling = tiny_model("llama"), Sampling(max_new_tokens=8, temperature=1.0, top_k=50, seed=5)
    whole = texts(model, PROMPTS, sampling, samples=2, batch_size=4)
    assert whole == texts(model, PROMPTS, sampling, samples=2, batch_size=1)
    assert whole[2:] == texts(model, PROMPTS[2:], sampling, samples=2, start=2)
    assert whole != texts(model, PROMPTS, Sampling(max_new_tokens=8, temperature=1.0, top_k=50, seed=6), samples=2)
    assert all(a != b for a, b in whole)


def test_draws_follow_the_softmax():
    """Chi-squared over 4,000 rows, 9 degrees of freedom; 27.9 is passed once in a thousand times."""
    logits = torch.linspace(-2, 2, 10)
    rows = 4000
    draw = GumbelDraw([stream_seed(0, i, 0) for i in range(rows)], torch.device("cpu"))
    picks = collections.Counter(draw(None, logits.repeat(rows, 1)).argmax(-1).tolist())
    expected = logits.softmax(-1) * rows
    assert sum((picks[i] - e.item()) ** 2 / e.item() for i, e in enumerate(expected)) < 27.9


def test_warpers_shape_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])

    def allowed(**keys):
        return (Sampling(temperature=1.0, **keys).warpers()(None, logits.clone()) > -math.inf).sum().item()

    assert (allowed(), allowed(top_k=2), allowed(top_p=0.5), allowed(min_p=0.2)) == (4, 2, 1, 2)
    assert torch.equal(Sampling(temperature=0.5).warpers()(None, logits.clone()), logits * 2)


def test_a_checkpoints_own_defaults_do_not_decide():
    model = tiny_model("llama")
    greedy = texts(model, PROMPTS, Sampling(max_new_tokens=6))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_length=5)
    assert texts(model, PROMPTS, Sampling(max_new_tokens=6)) == greedy


def test_how_completions_end():
    model = tiny_model("llama")
    first = next(generate(model, TOKENIZER, ["abc"], Sampling(max_new_tokens=12)))[0]
    assert (first.tokens, first.finish) == (12, "length")
    ids = [int(i) for i in model.generate(**TOKENIZER("abc", return_tensors="pt"), max_new_tokens=12)[0, 3:]]
    model.generation_config.eos_token_id = [ids[4], 258]
    ended = next(generate(model, TOKENIZER, ["abc"], Sampling(max_new_tokens=12)))[0]
    assert (ended.tokens, ended.finish) == (ids.index(ids[4]) + 1, "eos")


def test_stop_texts_are_cut_off():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    sampling = Sampling(max_new_tokens=400, temperature=1.0, stop=("q",))
    completions = [c[0] for c in generate(model, TOKENIZER, list("abcdef"), sampling)]
    stopped = [c for c in completions if c.finish == "stop"]
    assert len(stopped) >= 2  # the others drew the end token first
    assert all("q" not in c.text and len(c.text) < c.tokens < 400 for c in stopped)


def test_chat_template():
    with pytest.raises(UserError, match="no chat template"):
        chat_prompt(TOKENIZER, "hello")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    assert chat_prompt(tokenizer, "hello", "be kind") == "[system]be kind[user]hello[assistant]"


def test_bad_sampling():
    for keys in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"min_p": 1}, {"repetition_penalty": 0}):
        with pytest.raises(UserError, match=next(iter(keys))):
            Sampling(**keys).check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    save_model(tiny_model("llama"), TOKENIZER, folder / "model")
    rows = [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS * 2)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def verb(folder, output, **keys):
    options = {"max_new_tokens": 5, "temperature": 1.0, "batch_size": 2, "device": "cpu", **keys}
    return Generate(model=str(folder / "model"), prompts=[str(folder / "prompts.jsonl")], output=output, **options)


class StopAfter(Silent):
    def __init__(self, prompts):
        self.left = prompts

    def advance(self, units=1, note=""):
        self.left -= units
        if self.left <= 0:
            raise KeyboardInterrupt


def test_rows_and_summary(folder, tmp_path):
    found = verb(folder, tmp_path / "a.jsonl", samples=2, prompt=["first"]).run(Silent())
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert (found["prompts"], found["completions"], len(rows)) == (9, 18, 18)
    assert found["generated_tokens"] == sum(row["tokens"] for row in rows)
    assert [row["prompt"] for row in rows[::2]] == ["first", *PROMPTS * 2]
    assert [row.get("id") for row in rows[2::2]] == list(range(8))


def test_interrupted_at_any_prompt_it_continues_with_the_same_rows(folder, tmp_path):
    verb(folder, tmp_path / "whole.jsonl").run(Silent())
    partial = tmp_path / "a.jsonl.partial.jsonl"
    for prompts in (1, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            verb(folder, tmp_path / "a.jsonl").run(StopAfter(prompts + max(0, len(lines(partial)) - 1)))
        assert not (tmp_path / "a.jsonl").exists()
        with partial.open("a") as stream:
            stream.write('{"prompt": "cut sh')  # as kill -9 leaves it
    with pytest.raises(UserError, match="unfinished run with other options"):
        verb(folder, tmp_path / "a.jsonl", seed=1).run(Silent())
    verb(folder, tmp_path / "a.jsonl", batch_size=3).run(Silent())
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_what_was_refused_before_the_first_row_is_in_nobodys_way(folder, tmp_path):
    with pytest.raises(UserError, match=r"no field 'question'.*--prompt-field"):
        verb(folder, tmp_path / "a.jsonl", prompt_field="question").run(Silent())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.jsonl.partial.jsonl").write_text('{"plan": {}}\n')  # killed before the first row
    verb(folder, tmp_path / "a.jsonl").run(Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_is_refused(temperature):
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(UserError, match="not numbers"):
        list(generate(model, TOKENIZER, ["a"], Sampling(max_new_tokens=2, temperature=temperature)))


def test_faults(folder, tmp_path):
    with pytest.raises(UserError, match="no prompts"):
        Generate(model=str(folder / "model"), output=tmp_path / "a.jsonl").run(Silent())
    with pytest.raises(UserError, match="no room for 5 new ones in the model's 512"):
        verb(folder, tmp_path / "a.jsonl", prompt=["x" * 510]).run(Silent())
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(UserError, match="--force"):
        verb(folder, tmp_path / "b.jsonl").run(Silent())
    with pytest.raises(UserError, match="suffix"):
        verb(folder, tmp_path / "c.docx").run(Silent())
