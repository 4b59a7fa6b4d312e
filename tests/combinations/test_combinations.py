"""Methods together, as docs/combinations.md says."""

import pytest
import torch

from combinations.cases import (
    CONTEXTS,
    GENERATORS,
    ON_MODELS,
    PAGE,
    TOGETHER,
    TWO,
    TWO_ATTENTIONS,
    UNDER,
    WITH_LAW,
    WORKS_ON,
    page,
)
from modelwright.decoding.generate import Prompt, Sampling, generate
from modelwright.decoding.parts import read_parts
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
SAMPLING = Sampling(max_new_tokens=6)
PROMPTS = [
    Prompt("a first context that is long enough. why then?", "why then?"),
    Prompt("short one here, so.", "so."),
    Prompt("and a third of them with other words in it, is it?", "is it?"),
]


def attentive(family, seed=3):
    """A random model in which attention, and so positions and heads, decide what comes next."""
    model = tiny_model(family, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and any(part in name for part in ("attn", "attention", "lm_head", "embed_out")):
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("combinations")
    save_model(attentive("llama", seed=8), TOKENIZER, folder / "amateur")
    return folder


def save_an_edit(model, folder):
    """Adds a matrix of rank one to what the last layer puts out."""
    from modelwright.editing.deltas import LowRank
    from modelwright.editing.edit import WeightEdit
    from modelwright.editing.fingerprint import model_fingerprint

    ends = ("down_proj.weight", "mlp.c_proj.weight", "dense_4h_to_h.weight", "out_proj.weight")
    name = [n for n, _ in model.named_parameters() if n.endswith(ends)][-1]
    shape = model.get_parameter(name).shape
    draw = torch.Generator().manual_seed(1)
    delta = LowRank(torch.randn(shape[0], 1, generator=draw), torch.randn(1, shape[1], generator=draw))
    WeightEdit("test", model_fingerprint(model, whole=[name]), {name: delta}).save(folder, force=True)


def filled(value, folder):
    if isinstance(value, list):
        return [filled(one, folder) for one in value]
    return value.format(folder=folder) if isinstance(value, str) else value


def parts(names, folder, model):
    from modelwright.decoding.iti import HeadDirections
    from modelwright.models.heads import fingerprint

    if "iti" in names:
        shape = torch.nn.functional.normalize(torch.arange(16.0).view(2, 8) - 7, dim=-1)
        HeadDirections(
            [(0, 1), (1, 3)], shape, torch.tensor([0.5, 2.0]), torch.tensor([0.9, 0.8]), fingerprint(model)
        ).save(folder / "directions.safetensors", force=True)
    if "edited" in names:
        save_an_edit(model, folder / "edit")
    known = {**GENERATORS, **CONTEXTS}
    given = []
    for name in names:
        options = {k: filled(v, folder) for k, v in known[name].items()}
        given.append({name: options})
    return read_parts(given)


def written(applied, prompts=PROMPTS, batch_size=3):
    given = prompts if applied.needs_context else [p.text for p in prompts]
    found = generate(applied.model, TOKENIZER, given, SAMPLING, batch_size=batch_size, generate_with=applied.generate)
    return [list(completions[0].ids) for completions in found]


def by_law(applied, prompt):
    """What the method's own law, asked anew for each token without a cache, takes for the most probable."""
    ids, others, made = TOKENIZER(prompt.text)["input_ids"], TOKENIZER(prompt.without_context)["input_ids"], []
    for _ in range(SAMPLING.max_new_tokens):
        whole, extra = torch.tensor([ids + made]), {}
        if applied.needs_context:
            other = torch.tensor([others + made])
            extra = {"without_context_ids": other, "without_context_mask": torch.ones_like(other)}
        with torch.no_grad():
            made.append(int(applied.log_probs(whole, torch.ones_like(whole), **extra)[0, -1].argmax()))
        if made[-1] == TOKENIZER.eos_token_id:
            break
    return made


@pytest.mark.parametrize("pair", TOGETHER, ids=lambda pair: f"{pair.generator}-under-{pair.context}")
def test_together(pair, folder):
    model = attentive("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    alone = parts([pair.generator], folder, model)
    with alone.on(model, TOKENIZER) as applied:
        before = written(applied)
    both = parts([pair.generator, pair.context], folder, model)
    assert both.name == f"{pair.generator} under {pair.context}"
    with both.on(model, TOKENIZER) as applied:
        inside = written(applied)
        assert written(applied, batch_size=1) == inside
        if pair.generator in WITH_LAW:
            assert [by_law(applied, prompt) for prompt in PROMPTS] == inside
    assert inside != before
    with alone.on(model, TOKENIZER) as applied:
        assert written(applied) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # (transformers leaves hooks of its own that collect hidden states.)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in hooks if h.__module__.startswith("modelwright")]


@pytest.mark.parametrize("pair", TWO, ids=lambda pair: f"{pair.first}-{pair.second}")
def test_two_generators_are_refused(pair, folder):
    with pytest.raises(UserError, match=pair.sentence):
        parts([pair.first, pair.second], folder, attentive("llama"))


@pytest.mark.parametrize("pair", UNDER, ids=lambda pair: f"{pair.second}-under-{pair.first}")
def test_what_a_context_refuses(pair, folder):
    model = attentive("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    both = parts([pair.second, pair.first], folder, model)
    with pytest.raises(UserError, match=pair.sentence), both.on(model, TOKENIZER) as on:
        written(on)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pair", TWO_ATTENTIONS, ids=lambda pair: f"{pair.first}-{pair.second}")
def test_two_attentions_are_refused(pair, folder):
    model = attentive("llama")
    both = parts([pair.first, pair.second], folder, model)
    with pytest.raises(UserError, match=pair.sentence), both.on(model, TOKENIZER):
        pass


@pytest.mark.parametrize("pair", ON_MODELS, ids=lambda pair: f"{pair.first}-{pair.second}")
def test_families_that_a_method_refuses(pair, folder):
    model = attentive(pair.second)
    with pytest.raises(UserError, match=pair.sentence), parts([pair.first], folder, model).on(model, TOKENIZER) as on:
        written(on)


@pytest.mark.parametrize(("method", "family"), WORKS_ON)
def test_on_every_family(method, family, folder):
    model = attentive(family)
    with parts([], folder, model).on(model, TOKENIZER) as applied:
        plain = written(applied)
    with parts([method], folder, model).on(model, TOKENIZER) as applied:
        inside = written(applied)
        assert written(applied, batch_size=1) == inside
    if method in ("plain", "multi-draft"):
        assert inside == plain
    with parts([], folder, model).on(model, TOKENIZER) as applied:
        assert written(applied) == plain


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/combinations/cases.py"
