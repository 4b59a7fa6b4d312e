"""RoPE x ALiBi on a person's model: by name, in a block, for good, learned, saved, and refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modelwright.attention.implementation import read_attention
from modelwright.attention.prflash import ProbFlashConfig
from modelwright.attention.rope_alibi import RopeAlibiConfig
from modelwright.attention.rope_alibi.attention import LEARNED
from modelwright.attention.string import apply_string
from modelwright.errors import UserError
from modelwright.models.loading import load_model, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_config, tiny_model

IDS = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0))


def sharp(family="llama", **options):
    return tiny_model(family, initializer_range=0.3, **options)


def test_by_name():
    model = sharp()
    plain = model(IDS).logits
    with RopeAlibiConfig().apply(model):
        expected = model(IDS).logits
    assert torch.equal(model(IDS).logits, plain)
    model.set_attn_implementation("rope_alibi_harmonic")
    assert torch.equal(model(IDS).logits, expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS).logits, plain)


def test_a_block_touches_no_other_model_of_the_same_config():
    model = sharp()
    other = AutoModelForCausalLM.from_config(model.config)
    expected = other(IDS).logits
    config = model.config
    with RopeAlibiConfig().apply(model):
        assert torch.equal(other(IDS).logits, expected)
        with RopeAlibiConfig(lambda_a=0.5).apply(model):
            pass
    assert model.config is config
    assert not hasattr(config, "modelwright_attention")


def test_a_block_is_left_by_an_error():
    model = sharp()
    expected = model(IDS).logits
    with pytest.raises(ZeroDivisionError), RopeAlibiConfig().apply(model):
        raise ZeroDivisionError
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("learnable", [False, True])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, learnable):
    model = sharp()
    RopeAlibiConfig(distance="harmonic", lambda_a=0.5, learnable=learnable).install(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(LEARNED):
                parameter.uniform_(0.2, 0.8)
    expected = model(IDS).logits
    save_model(model, byte_tokenizer(), tmp_path / "m")
    loaded = load_model(tmp_path / "m", device="cpu")
    assert torch.equal(loaded(IDS).logits, expected)
    # transformers alone does it too, by the name, where nothing was learned.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="rope_alibi_harmonic")
    if learnable:
        with pytest.raises(UserError, match="load_model"):
            theirs(IDS)
    else:
        assert torch.equal(theirs(IDS).logits, expected)


def test_weights_that_were_learned_must_be_there(tmp_path):
    model = sharp()
    RopeAlibiConfig(learnable=True).install(model)
    for module in model.modules():
        module._parameters.pop(LEARNED[0], None)
    save_model(model, byte_tokenizer(), tmp_path / "m")
    with pytest.raises(UserError, match="2 weights of the attention 'rope-alibi' are missing"):
        load_model(tmp_path / "m", device="cpu")


def test_a_config_that_names_no_attention(tmp_path):
    model = sharp()
    model.config.modelwright_attention = {"name": "no-such"}
    save_model(model, byte_tokenizer(), tmp_path / "m")
    with pytest.raises(UserError, match="no 'no-such' among the attentions"):
        load_model(tmp_path / "m", device="cpu")


def test_learned_factors_start_where_they_are_told_and_stay_between_0_and_1():
    model = sharp().train()
    with RopeAlibiConfig(lambda_r=1.0, lambda_a=0.5).apply(model):
        expected = model(IDS).logits
    RopeAlibiConfig(lambda_r=1.0, lambda_a=0.5, learnable=True).install(model)
    factors = {n: p for n, p in model.named_parameters() if n.endswith(LEARNED)}
    assert [p.shape for p in factors.values()] == [(4,)] * 4
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)
    optimizer = torch.optim.SGD(factors.values(), lr=50.0)
    for _ in range(4):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert any(not torch.equal(p, torch.full_like(p, 0.5)) for n, p in factors.items() if n.endswith(LEARNED[1]))
    from modelwright.attention.rope_alibi.attention import _Unit

    x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    assert _Unit.apply(x).tolist() == [0, 0, 0.5, 1, 1]
    up, down = (torch.autograd.grad(_Unit.apply(x).sum() * sign, x)[0].tolist() for sign in (-1, 1))
    assert up == [-1, -1, -1, 0, 0]  # a step against it would increase x: stopped where x is 1 or more
    assert down == [0, 0, 1, 1, 1]


def test_learned_factors_have_the_gradient_of_a_difference():
    model = sharp()
    RopeAlibiConfig(lambda_r=0.8, lambda_a=0.5, learnable=True).install(model)
    model.double()

    def loss():
        logits = model(IDS).logits[:, :-1].double()  # (the library's own loss is float32)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    for name, parameter in model.named_parameters():
        if not name.endswith(LEARNED):
            continue
        (slope,) = torch.autograd.grad(loss(), parameter)
        step = torch.zeros_like(parameter)
        step[1] = 1e-3
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                parameter.add_(sign * step)
                losses.append(loss())
                parameter.sub_(sign * step)
        torch.testing.assert_close(slope[1], (losses[0] - losses[1]) / 2e-3, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints_change_no_gradient(reentrant):
    def gradients(checkpoints):
        model = sharp().train()
        RopeAlibiConfig(learnable=True).install(model)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "words"), [("gpt2", "its positions are not rotary"), ("mamba2", "its positions are not rotary")]
)
def test_models_without_rotary_positions_are_refused(family, words):
    model = tiny_model(family)
    with pytest.raises(UserError, match=words), RopeAlibiConfig().apply(model):
        pass
    with pytest.raises(UserError, match=words):
        RopeAlibiConfig().install(model)


def test_a_model_without_rotary_positions_is_refused_by_name_too():
    model = tiny_model("gpt2")
    model.set_attn_implementation("rope_alibi_harmonic")
    with pytest.raises(UserError, match="gpt2 model cannot have the attention 'rope-alibi'"):
        model(IDS)
    # Where the rotary score has no part, the penalty alone can do its work.
    with RopeAlibiConfig(lambda_r=0.0).apply(model):
        assert model(IDS).logits.isfinite().all()


def test_bloom_has_alibi_and_no_replaceable_attention():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_head=4, n_layer=1))
    with pytest.raises(UserError, match="not rotary"), RopeAlibiConfig().apply(model):
        pass
    with pytest.raises(UserError, match="does not ask transformers"), RopeAlibiConfig(lambda_r=0.0).apply(model):
        pass


def test_two_changes_of_one_attention_are_refused():
    model = sharp()
    with RopeAlibiConfig().apply(model):
        with pytest.raises(UserError, match="changed by rope-alibi already"), ProbFlashConfig().apply(model):
            pass
        with pytest.raises(UserError, match="another context already"), apply_string(model):
            pass
    with apply_string(model), pytest.raises(UserError, match="by a context already"), RopeAlibiConfig().apply(model):
        pass
    RopeAlibiConfig().install(model)
    with pytest.raises(UserError, match="changed by rope-alibi already"):
        ProbFlashConfig().install(model)
    RopeAlibiConfig(distance="harmonic").install(model)
    assert model.config.modelwright_attention["options"]["distance"] == "harmonic"


def test_factors_are_not_learned_in_a_block():
    with pytest.raises(UserError, match="for training"), RopeAlibiConfig(learnable=True).apply(sharp()):
        pass


def test_attention_sinks_are_refused():
    with RopeAlibiConfig().apply(model := sharp()):
        attention = model.model.layers[0].self_attn
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS["rope_alibi_harmonic"]
        x = torch.zeros(1, 4, 3, 8)
        with pytest.raises(UserError, match="sinks"):
            function(attention, x, x, x, None, s_aux=torch.zeros(4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no-such", "no 'no-such' among the attentions"),
        ("rope-alibi: {lambda_b: 1}", "no option 'lambda_b'"),
        ("rope-alibi: {distance: far}", "cannot be 'far'"),
        ("rope-alibi: 3", "must be a mapping"),
        ("[rope-alibi, prflash]", "must name one attention"),
        ("rope-alibi: {", "not valid YAML"),
    ],
)
def test_attentions_in_words(text, words):
    with pytest.raises(UserError, match=words):
        read_attention(text)


def test_attentions_in_words_that_are_right():
    assert read_attention("rope_alibi") == RopeAlibiConfig()
    assert read_attention("rope-alibi: {distance: harmonic, lambda_a: 0.5}") == RopeAlibiConfig(
        distance="harmonic", lambda_a=0.5
    )


def test_a_new_model_needs_only_its_config():
    config = tiny_config("llama")
    config.modelwright_attention = RopeAlibiConfig(lambda_a=0.3).as_dict()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="rope_alibi_harmonic").eval()
    expected = model(IDS).logits
    model.set_attn_implementation("sdpa")
    with RopeAlibiConfig(lambda_a=0.3).apply(model):
        assert torch.equal(model(IDS).logits, expected)
