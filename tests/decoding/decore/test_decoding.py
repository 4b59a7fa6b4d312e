import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation.streamers import TextIteratorStreamer

from decoding.decore.decore_cases import ATTENTION, HEADS, INPUTS, TOKENIZER, make, rows
from modelwright.attention.string import StringConfig, apply_string
from modelwright.decoding.contrast import contrast, entropy, keep_plausible
from modelwright.decoding.decore import DeCoReConfig, HeadAblation, decore_generate
from modelwright.errors import UserError

LENGTH = 16


def generate(model, config, **keys):
    keys = {**INPUTS, "max_new_tokens": LENGTH, "do_sample": False, **keys}
    return model.generate(**keys, custom_generate=decore_generate(config))


@pytest.mark.parametrize("family", ATTENTION)
@pytest.mark.parametrize("mask_from", ["last", "all"])
def test_without_strength_or_heads_it_is_greedy_generate(family, mask_from):
    model = make(family)
    plain = model.generate(**INPUTS, max_new_tokens=LENGTH, do_sample=False)
    assert torch.equal(generate(model, DeCoReConfig(HEADS, alpha=0.0, mask_from=mask_from)), plain)
    assert torch.equal(generate(model, DeCoReConfig([], alpha=2.5, mask_from=mask_from)), plain)
    assert torch.equal(generate(model, DeCoReConfig([], mask_from=mask_from)), plain)
    assert torch.equal(generate(model, DeCoReConfig(HEADS, alpha=5.0, alpha_cap=0.0, mask_from=mask_from)), plain)
    # Through the twin, which the others do without:
    assert torch.equal(generate(model, DeCoReConfig(HEADS, alpha=1e-12, mask_from=mask_from)), plain)
    for config in (DeCoReConfig(HEADS, alpha=0.0), DeCoReConfig([]), DeCoReConfig(HEADS, alpha_cap=0.0)):
        assert config.idle
    assert not DeCoReConfig([], amateur=model).idle
    assert not DeCoReConfig(HEADS, alpha="entropy-gain", alpha_cap=0.0).idle


@pytest.mark.parametrize("family", ATTENTION)
@pytest.mark.parametrize("ablation", ["zero", "uniform"])
@pytest.mark.parametrize("mask_from", ["last", "all"])
def test_one_batch_two_streams_and_no_cache_give_the_same_tokens(family, ablation, mask_from):
    model = make(family)
    keys = {"alpha": 2.5, "ablation": ablation, "mask_from": mask_from}
    found = generate(model, DeCoReConfig(HEADS, **keys))
    assert not torch.equal(found, model.generate(**INPUTS, max_new_tokens=LENGTH, do_sample=False))
    assert torch.equal(generate(model, DeCoReConfig(HEADS, batch=False, **keys)), found)
    assert torch.equal(generate(model, DeCoReConfig(HEADS, **keys), use_cache=False), found)
    assert torch.equal(generate(model, DeCoReConfig(HEADS, batch=False, **keys), use_cache=False), found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("mask_from", ["last", "all"])
def test_each_step_is_the_definition(family, mask_from):
    """Against two forward passes over everything so far, with the contrast written out."""
    model = make(family).double()
    config = DeCoReConfig(HEADS, alpha="entropy", mask_from=mask_from, relative_top=0.01)
    ids = INPUTS["input_ids"][:1]
    found = generate(
        model, config, input_ids=ids, attention_mask=None, return_dict_in_generate=True, output_logits=True
    )
    prompt = ids.shape[1]
    with torch.no_grad():
        for step, logits in enumerate(found.logits):
            so_far = found.sequences[:, : prompt + step]
            base = model(so_far, use_cache=False).logits[0, -1].log_softmax(-1)
            with HeadAblation(model, HEADS) as twin:
                if mask_from == "last":
                    twin.where = (torch.arange(so_far.shape[1]) >= prompt - 1)[None]
                masked = model(so_far, use_cache=False).logits[0, -1].log_softmax(-1)
            alpha = -(base.exp() * (base.exp() + 1e-12).log()).sum()
            wanted = (1 + alpha) * base - alpha * masked
            wanted[base < base.max() + math.log(0.01)] = -math.inf
            torch.testing.assert_close(logits[0].softmax(-1), wanted.softmax(-1), atol=1e-10, rtol=1e-8)


def test_the_constant_that_is_the_entropy_is_the_entropy():
    model = make().double()
    ids = INPUTS["input_ids"][:1]
    with torch.no_grad():
        h = float(entropy(model(ids).logits[0, -1]))
    keys = {"input_ids": ids, "attention_mask": None, "max_new_tokens": 1, "return_dict_in_generate": True,
            "output_logits": True}  # fmt: skip
    (one,), (other,) = (generate(model, DeCoReConfig(HEADS, alpha=a), **keys).logits for a in ("entropy", h))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", ATTENTION)
def test_padding_changes_nothing(family):
    model = make(family)
    if family != "gemma2":  # transformers' eager attention gives NaN for padding in float64
        model = model.double()
    config = DeCoReConfig(HEADS, alpha="entropy")
    together = generate(model, config)
    for row in range(2):
        ids = INPUTS["input_ids"][row][INPUTS["attention_mask"][row].bool()][None]
        alone = generate(model, config, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(alone[0, -LENGTH:], together[row, -LENGTH:])


def test_bfloat16():
    """Scores are contrasted in float32, so that strength 0 changes no token there either."""
    model = make().to(torch.bfloat16)
    plain = model.generate(**INPUTS, max_new_tokens=4, do_sample=False)
    keys = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    out = generate(model, DeCoReConfig(HEADS, alpha=0.0), **keys)
    assert torch.equal(out.sequences, plain)
    out = generate(model, DeCoReConfig(HEADS, alpha="entropy"), **keys)
    assert out.logits[0].dtype == torch.float32
    assert decore_generate(DeCoReConfig(HEADS)).next_token_log_probs(model, **_ids()).dtype == torch.float32


def _ids():
    return {"input_ids": INPUTS["input_ids"], "attention_mask": INPUTS["attention_mask"]}


def test_a_prompt_of_one_token():
    model = make()
    ids = INPUTS["input_ids"][:, -1:]
    config = DeCoReConfig(HEADS, alpha=2.0)
    keys = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = generate(model, DeCoReConfig(HEADS, alpha=2.0, mask_from="all"), **keys)
    for batch in (True, False):
        config = DeCoReConfig(HEADS, alpha=2.0, batch=batch)
        assert torch.equal(generate(model, config, **keys), wanted)


def test_samples_follow_the_contrasted_law():
    model = make()
    config = DeCoReConfig(HEADS, alpha=1.0, relative_top=0.05)
    ids = INPUTS["input_ids"][:1]
    law = generate(
        model, config, input_ids=ids, attention_mask=None, max_new_tokens=1, return_dict_in_generate=True,
        output_logits=True,
    ).logits[0][0]  # fmt: skip
    shaped = (law / 0.7).softmax(-1).double()
    torch.manual_seed(0)
    drawn = generate(
        model, config, input_ids=ids, attention_mask=None, max_new_tokens=1, do_sample=True, temperature=0.7, top_k=0,
        num_return_sequences=4000,
    )[:, -1]  # fmt: skip
    counts = torch.bincount(drawn, minlength=len(law)).double()
    assert counts[shaped == 0].sum() == 0
    likely = shaped > 5 / 4000
    spread = (shaped * 4000 * (1 - shaped)).sqrt()
    assert ((counts - 4000 * shaped).abs()[likely] < 5 * spread[likely]).all()


def test_generate_gets_what_it_expects():
    model = make()
    config = DeCoReConfig(HEADS, alpha=2.0)
    out = generate(model, config, return_dict_in_generate=True, output_scores=True, repetition_penalty=1.3)
    assert out.sequences.shape == (2, INPUTS["input_ids"].shape[1] + LENGTH)
    assert len(out.scores) == LENGTH
    assert out.scores[0].shape == (2, model.config.vocab_size)
    assert torch.equal(torch.stack([s.argmax(-1) for s in out.scores], 1), out.sequences[:, -LENGTH:])
    end = int(out.sequences[0, -LENGTH + 4])
    short = generate(model, config, repetition_penalty=1.3, eos_token_id=end, pad_token_id=0)
    first = out.sequences[0, -LENGTH:].tolist().index(end)
    assert short[0, -(short.shape[1] - INPUTS["input_ids"].shape[1]) :][first] == end
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
    ids = INPUTS["input_ids"][:1]
    one = model.generate(
        ids, max_new_tokens=5, do_sample=False, custom_generate=decore_generate(config, streamer=streamer)
    )
    assert "".join(streamer) == TOKENIZER.decode(one[0, -5:])


def test_the_callers_cache_holds_the_models_own_rows_afterwards():
    model = make()
    ids = INPUTS["input_ids"][:1]
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache, use_cache=True)
    keys = {"input_ids": ids, "attention_mask": None}
    config = DeCoReConfig(HEADS, alpha=2.0)
    wanted = generate(model, config, **keys)
    out = generate(model, config, past_key_values=cache, return_dict_in_generate=True, **keys)
    assert torch.equal(out.sequences, wanted)
    assert out.past_key_values is cache
    fresh = DynamicCache()
    with torch.no_grad():
        model(wanted[:, :-1], past_key_values=fresh, use_cache=True)
    for own, other in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="mask_from='last'"):
        begun = copy.deepcopy(cache)
        begun.crop(9 - begun.get_seq_length())
        generate(model, DeCoReConfig(HEADS, mask_from="all"), past_key_values=begun, **keys)


def test_the_model_is_as_it_was_afterwards_whatever_happens():
    model = make()
    before = model.generate(
        **INPUTS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )

    def stop(ids, scores, **keys):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, DeCoReConfig(HEADS), stopping_criteria=[stop])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = model.generate(
        **INPUTS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


@pytest.mark.parametrize("mask_from", ["last", "all"])
def test_an_amateur_takes_the_twins_part(mask_from):
    model, amateur = make().double(), make("gpt_neox", seed=5, num_hidden_layers=3).double()
    config = DeCoReConfig([(2, 1)], amateur=amateur, mask_from=mask_from)
    found = generate(model, config, return_dict_in_generate=True, output_logits=True)
    prompt = INPUTS["input_ids"].shape[1]
    so_far = found.sequences[:1, : prompt + 3]
    with torch.no_grad():
        base = model(so_far).logits[0, -1]
        with HeadAblation(amateur, [(2, 1)]) as twin:
            if mask_from == "last":
                twin.where = (torch.arange(prompt + 3) >= prompt - 1)[None]
            other = amateur(so_far).logits[0, -1]
    wanted = contrast(base, other, entropy(base))
    torch.testing.assert_close(found.logits[3][0].softmax(-1), wanted.softmax(-1), atol=1e-10, rtol=1e-8)
    assert torch.equal(generate(model, config, use_cache=False), found.sequences)
    # Against itself with nothing off, an amateur says nothing.
    same = DeCoReConfig([], amateur=model, alpha=3.0)
    assert torch.equal(generate(model, same), model.generate(**INPUTS, max_new_tokens=LENGTH, do_sample=False))


@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probabilities_of_given_texts(side):
    model = make()
    texts = ["Once upon a time there", "short"]
    ids, mask = rows(texts, side)
    config = DeCoReConfig(HEADS, alpha="entropy", relative_top=None)
    found = decore_generate(config).next_token_log_probs(model, ids, mask)
    assert found.shape == (*ids.shape, model.config.vocab_size)
    assert found.dtype == torch.float32
    for row, text in enumerate(texts):
        own = torch.tensor(TOKENIZER(text)["input_ids"])
        with torch.no_grad():
            base = model(own[None]).logits[0].log_softmax(-1)
            with HeadAblation(model, HEADS):
                twin = model(own[None]).logits[0].log_softmax(-1)
        h = -(base.exp() * base).sum(-1, keepdim=True)
        wanted = ((1 + h) * base - h * twin).log_softmax(-1)
        torch.testing.assert_close(found[row][mask[row].bool()], wanted, atol=2e-4, rtol=1e-3)
        score = config.score(model, own[:2], own[2:])
        torch.testing.assert_close(score, wanted[1:-1].gather(-1, own[2:, None])[:, 0], atol=2e-4, rtol=1e-3)


def test_scoring_from_the_last_prompt_token_is_what_generation_sees():
    model = make().double()
    config = DeCoReConfig(HEADS, alpha=1.0, score_from="last")
    ids = INPUTS["input_ids"][:1]
    out = generate(model, config, input_ids=ids, attention_mask=None, return_dict_in_generate=True, output_logits=True)
    said = out.sequences[0, -LENGTH:]
    wanted = torch.stack([s[0].log_softmax(-1)[t] for s, t in zip(out.logits, said, strict=True)])
    torch.testing.assert_close(config.score(model, ids[0], said), wanted, atol=1e-8, rtol=1e-6)
    with pytest.raises(UserError, match="prompts' lengths"):
        decore_generate(config).next_token_log_probs(model, ids)
    with pytest.raises(UserError, match="at least one token"):
        config.score(model, [], [3])


def test_the_entropy_gain_and_the_scaled_entropy():
    base, twin = torch.randn(3, 11, dtype=torch.float64), torch.zeros(3, 11, dtype=torch.float64)
    gain = DeCoReConfig([], alpha="entropy-gain").strength(base, twin)
    torch.testing.assert_close(gain, math.log(11) - entropy(base), atol=1e-9, rtol=0)
    back = DeCoReConfig([], alpha="entropy-gain").strength(twin, base)
    assert (back < 0).all()
    scaled = DeCoReConfig([], scale_alpha=True).strength(twin, base)
    torch.testing.assert_close(scaled, torch.ones(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert DeCoReConfig([], alpha_cap=0.3).strength(twin, base).tolist() == [0.3] * 3
    assert DeCoReConfig([], alpha=0.5, alpha_cap=0.3).strength(twin, base) == 0.3


def test_entropies_that_are_known():
    assert float(entropy(torch.zeros(50, dtype=torch.float64))) == pytest.approx(math.log(50), abs=1e-9)
    sure = torch.full((50,), -1e4, dtype=torch.float64)
    sure[7] = 1e4
    assert abs(float(entropy(sure))) < 1e-11


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 8))
def test_raw_logits_and_log_probabilities_contrast_alike(seed, alpha):
    base, twin = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    raw = contrast(base, twin, alpha).softmax(-1)
    logs = ((1 + alpha) * base.log_softmax(-1) - alpha * twin.log_softmax(-1)).softmax(-1)
    torch.testing.assert_close(raw, logs, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        contrast(base[None], twin[None], torch.tensor([alpha])).softmax(-1)[0], raw, atol=1e-6, rtol=0
    )
    kept = keep_plausible(base, base, 0.1) > -math.inf
    assert torch.equal(kept, base.softmax(-1) >= 0.1 * base.softmax(-1).max())


def test_tokens_that_the_model_rules_out_stay_ruled_out():
    base, twin = torch.tensor([1.0, -math.inf, 2.0]), torch.tensor([0.5, -math.inf, 1.0])
    for alpha in (0.0, 1.0, torch.tensor(1.0)):
        found = contrast(base, twin, alpha)
        assert found[1] == -math.inf
        assert torch.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"heads": [(0, 9)]}, "Layer 0 has no head 9: its heads are 0 to 3"),
        ({"heads": [(7, 0)]}, "no layer 7 .* layers 0 to 1"),
        ({"heads": [(0, 1), (0, 1)]}, "given twice"),
        ({"heads": [3]}, "is no head"),
        ({"heads": HEADS, "ablation": "mean"}, "needs the heads' mean outputs"),
    ],
)
def test_heads_that_are_not_there_are_refused_before_anything_is_read(keys, message):
    model = make()
    read = []
    model.register_forward_pre_hook(lambda *a: read.append(1))
    with pytest.raises(UserError, match=message):
        generate(model, DeCoReConfig(**keys))
    with pytest.raises(UserError, match=message):
        decore_generate(DeCoReConfig(**keys)).check(model)  # what a command asks before it begins
    assert not read


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alpha": -0.1}, "0 or more"),
        ({"alpha": math.nan}, "0 or more"),
        ({"alpha": "entropic"}, "a number, entropy or entropy-gain"),
        ({"alpha_cap": -1.0}, "0 or more"),
        ({"relative_top": 0.0}, "above 0 and at most 1"),
        ({"relative_top": 1.5}, "above 0 and at most 1"),
        ({"mask_from": "first"}, "last or all"),
        ({"ablation": "off"}, "no ablation 'off'"),
    ],
)
def test_values_out_of_range(keys, message):
    with pytest.raises(UserError, match=message):
        DeCoReConfig(HEADS, **keys)


def test_an_amateur_of_another_vocabulary_and_a_model_without_heads():
    model = make()
    with pytest.raises(UserError, match="The amateur has 300 tokens and the model 259"):
        generate(model, DeCoReConfig(HEADS, amateur=make(vocab_size=300)))
    with pytest.raises(UserError, match="no attention heads"):
        HeadAblation(make("mamba2"), HEADS)
    with pytest.raises(UserError, match="leave out num_beams"):
        generate(model, DeCoReConfig(HEADS), num_beams=2)
    with pytest.raises(UserError, match="dynamic cache"):
        generate(model, DeCoReConfig(HEADS), cache_implementation="static")


def test_it_works_under_another_methods_attention():
    """STRING changes the positions of far keys; the twin sees the same positions as the model."""
    model = make(max_position_embeddings=64)
    ids, mask = rows(["a prompt that is long enough for far keys to be shifted", "short"])
    keys = {"input_ids": ids, "attention_mask": mask}
    plain = generate(model, DeCoReConfig(HEADS, alpha=2.5), **keys)
    with apply_string(model, StringConfig(shift=16, window=4)):
        own = model.generate(**keys, max_new_tokens=LENGTH, do_sample=False)
        assert torch.equal(generate(model, DeCoReConfig(HEADS, alpha=0.0), **keys), own)
        found = generate(model, DeCoReConfig(HEADS, alpha=2.5), **keys)
        assert torch.equal(generate(model, DeCoReConfig(HEADS, alpha=2.5, batch=False), **keys), found)
        assert torch.equal(generate(model, DeCoReConfig(HEADS, alpha=2.5), use_cache=False, **keys), found)
    assert not torch.equal(found, plain)
    assert torch.equal(generate(model, DeCoReConfig(HEADS, alpha=2.5), **keys), plain)


@pytest.mark.parametrize("size", [256, 300])
def test_tables_of_one_tokenizer_that_were_padded_differently(size):
    model, amateur = make().double(), make(vocab_size=size).double()
    config = DeCoReConfig(HEADS, amateur=amateur, pad_vocabulary=True)
    ids = INPUTS["input_ids"][:1]
    found = decore_generate(config).next_token_log_probs(model, ids)
    with torch.no_grad():
        base = model(ids).logits
        with HeadAblation(amateur, HEADS):
            twin = amateur(ids).logits
    common = min(size, 259)
    wanted = contrast(base[..., :common], twin[..., :common], entropy(base)).log_softmax(-1)
    torch.testing.assert_close(found[..., :common], wanted, atol=1e-9, rtol=1e-9)
    assert found.shape[-1] == 259
    assert (found[..., common:] == -math.inf).all()
    assert generate(model, config).shape[1] == INPUTS["input_ids"].shape[1] + LENGTH
