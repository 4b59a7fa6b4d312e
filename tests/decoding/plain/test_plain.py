import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from modelwright.decoding.loop import Prompt, Stream
from modelwright.decoding.plain import PlainDecoding, PlainOptions
from modelwright.errors import UserError
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

tokenizer = byte_tokenizer()
INPUTS = tokenizer(["Once upon a time there was", "short"], return_tensors="pt", padding=True)
ATTENTION = [family for family in FAMILIES if family != "mamba2"]


def make(family="llama", **options):
    return tiny_model(family, initializer_range=0.3, eos_token_id=None, **options)


@pytest.mark.parametrize("family", ATTENTION)
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_loop_is_generate(family, use_cache):
    model = make(family)
    keys = {**INPUTS, "max_new_tokens": 24, "do_sample": False, "use_cache": use_cache}
    assert torch.equal(model.generate(**keys, custom_generate=PlainDecoding()), model.generate(**keys))


def test_sampling_with_processors_is_that_of_generate():
    model = make()
    keys = dict(**INPUTS, max_new_tokens=20, do_sample=True, temperature=1.3, top_p=0.9, top_k=30,
                repetition_penalty=1.2, num_return_sequences=3)  # fmt: skip
    torch.manual_seed(3)
    wanted = model.generate(**keys)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**keys, custom_generate=PlainDecoding()), wanted)
    assert len(wanted) == 6


def test_scores_logits_and_the_cache_are_returned_as_generate_returns_them():
    model = make()
    keys = dict(**INPUTS, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True,
                output_logits=True, min_new_tokens=4)  # fmt: skip
    wanted, found = model.generate(**keys), model.generate(**keys, custom_generate=PlainDecoding())
    assert torch.equal(found.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        assert len(getattr(found, name)) == 6
        for one, other in zip(getattr(found, name), getattr(wanted, name), strict=True):
            torch.testing.assert_close(one, other)
    assert found.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()


def test_rows_end_at_the_end_token_and_are_padded():
    model = make()
    model.generation_config.eos_token_id = int(model.generate(**INPUTS, max_new_tokens=4, do_sample=False)[0, -1])
    keys = {**INPUTS, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**keys)
    assert torch.equal(model.generate(**keys, custom_generate=PlainDecoding()), wanted)
    assert (wanted[0] == 0).any()


class Kept(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_gets_prompt_and_tokens():
    model, kept = make(), Kept()
    out = model.generate(**INPUTS, max_new_tokens=5, do_sample=False, custom_generate=PlainDecoding(streamer=kept))
    assert torch.equal(kept.parts[0], INPUTS["input_ids"])
    assert torch.equal(torch.stack(kept.parts[1:], 1), out[:, -5:])
    assert kept.ended


def test_a_cache_that_holds_the_beginning_is_gone_on_with():
    model, cache = make(), DynamicCache()
    ids = INPUTS["input_ids"][:1]
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache, use_cache=True)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    keys = {"max_new_tokens": 8, "do_sample": False, "custom_generate": PlainDecoding()}
    assert torch.equal(model.generate(ids, past_key_values=cache, **keys), wanted)
    with pytest.raises(UserError, match="holds .* tokens already"):
        model.generate(ids, past_key_values=cache, **keys)


def test_a_stream_grows_beyond_the_room_it_was_told():
    model = make()
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    small = Stream(model, Prompt(ids, mask, cache=DynamicCache(), room=0))
    large = Stream(model, Prompt(ids, mask, cache=DynamicCache(), room=99))
    with torch.no_grad():
        for part in (ids, ids[:, :3], ids[:, :4]):
            assert torch.equal(small.logits(part), large.logits(part))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_beams": 2}, "leave out num_beams"),
        ({"cache_implementation": "static"}, "dynamic cache, not one with layers of the kind Static"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "leave out output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "leave out output_hidden_states"),
    ],
)
def test_what_does_not_go_is_refused_before_anything_is_read(keys, message):
    model = make()
    read = []
    model.register_forward_pre_hook(lambda *a: read.append(1))
    with pytest.raises(UserError, match=message):
        model.generate(**INPUTS, max_new_tokens=4, custom_generate=PlainDecoding(), **keys)
    assert not read


def test_right_padding_recurrent_models_and_static_caches_are_refused():
    ids = INPUTS["input_ids"]
    mask = INPUTS["attention_mask"].flip(1)
    with pytest.raises(UserError, match="padded on the left"):
        make().generate(ids, attention_mask=mask, max_new_tokens=4, custom_generate=PlainDecoding())
    with pytest.raises(UserError, match="recurrent state"):
        make("mamba2").generate(ids, max_new_tokens=4, custom_generate=PlainDecoding())
    model = make()
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(UserError, match="dynamic cache"):
        model.generate(ids[:1], past_key_values=cache, max_new_tokens=4, custom_generate=PlainDecoding())


@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probabilities_are_the_models(side):
    model = make()
    rows = [tokenizer(t)["input_ids"] for t in ("Once upon a time", "short")]
    width = max(map(len, rows))
    ids = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        at = slice(width - len(own), width) if side == "left" else slice(0, len(own))
        ids[row, at], mask[row, at] = torch.tensor(own), 1
    found = PlainOptions().custom_generate(model, tokenizer).next_token_log_probs(model, ids, mask)
    for row, own in enumerate(rows):
        with torch.no_grad():
            wanted = model(torch.tensor([own])).logits[0].log_softmax(-1)
        torch.testing.assert_close(found[row][mask[row].bool()], wanted, atol=1e-5, rtol=1e-4)
