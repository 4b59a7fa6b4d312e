import math

import pytest
import torch

from decoding.decore.decore_cases import ATTENTION, INPUTS, TOKENIZER, make, rows
from modelwright.decoding.dola import DoLaDecoding, DoLaOptions
from modelwright.decoding.dola import decoding as module
from modelwright.decoding.dola.decoding import divergence
from modelwright.decoding.early_exit import EarlyExit
from modelwright.errors import UserError

NEW = 8


def generate(model, decoding, **keys):
    keys = {**INPUTS, "max_new_tokens": NEW, "do_sample": False, **keys}
    return model.generate(**keys, custom_generate=decoding)


@pytest.mark.parametrize(("norm", "chunk"), [(False, 1 << 27), (True, 1 << 27), (True, 5000)])
def test_each_step_is_the_definition(norm, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    model = make(num_hidden_layers=4).double()
    decode = DoLaDecoding([0, 1, 3], norm=norm)
    out = generate(model, decode, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = model(out.sequences[:1], output_hidden_states=True)
    chosen = set()
    for step, logits in enumerate(out.logits):
        at = out.sequences.shape[1] - NEW + step - 1
        p = whole.logits[0, at].softmax(-1)
        best = (-1.0, None, None)
        for layer in (0, 1, 3):
            hidden = whole.hidden_states[layer][0, at]
            q = model.lm_head(model.model.norm(hidden) if norm else hidden).softmax(-1).detach()
            m = (p + q) / 2
            js = float(0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum())
            best = max(best, (js, layer, q), key=lambda item: item[0])
        chosen.add(best[1])
        wanted = (p / best[2]).log()
        wanted[p < 0.1 * p.max()] = -math.inf
        torch.testing.assert_close(logits[0].softmax(-1), wanted.softmax(-1), atol=1e-9, rtol=1e-6)
    assert torch.equal(generate(model, decode, use_cache=False), out.sequences)
    given = decode.next_token_log_probs(model, out.sequences[:1])
    made = torch.stack([logits[0].log_softmax(-1) for logits in out.logits])
    torch.testing.assert_close(given[0, -NEW - 1 : -1], made, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("family", ATTENTION)
def test_a_row_does_not_depend_on_its_neighbours(family):
    model = make(family, num_hidden_layers=4)
    together = generate(model, DoLaDecoding([1, 2, 3], norm=True))
    ids, mask = rows(["short"])
    alone = generate(model, DoLaDecoding([1, 2, 3], norm=True), input_ids=ids, attention_mask=mask)
    assert torch.equal(alone[0, -NEW:], together[1, -NEW:])


@pytest.mark.parametrize("family", ATTENTION)
def test_the_head_behind_the_last_layer_is_the_models(family):
    model = make(family)
    with torch.no_grad():
        out = model(INPUTS["input_ids"], output_hidden_states=True)
        # The last hidden state has the norm behind it already.
        torch.testing.assert_close(EarlyExit(model)(out.hidden_states[-1]), out.logits, atol=1e-4, rtol=1e-4)


def test_divergences_that_are_known():
    one = torch.tensor([1.0, 0.0], dtype=torch.float64).clamp(min=1e-300).log()
    assert float(divergence(one, one.flip(0))) == pytest.approx(math.log(2))
    assert float(divergence(one, one)) == pytest.approx(0, abs=1e-12)


def test_layers():
    assert DoLaDecoding("low").candidates(make(num_hidden_layers=8)) == [0, 2]
    assert DoLaDecoding("high").candidates(make(num_hidden_layers=8)) == [4, 6]
    assert DoLaDecoding("low").candidates(make(num_hidden_layers=8, tie_word_embeddings=True)) == [2]
    assert DoLaOptions(layers="0,3").custom_generate(make(num_hidden_layers=4), TOKENIZER).layers == [0, 3]
    with pytest.raises(UserError, match="Layer 4 is no early one"):
        DoLaOptions(layers="4").custom_generate(make(num_hidden_layers=4), TOKENIZER)
    with pytest.raises(UserError, match="give low, high or numbers"):
        DoLaOptions(layers="upper").custom_generate(make(), TOKENIZER)
    with pytest.raises(UserError, match="no 'low' early layers"):
        DoLaDecoding("low").candidates(make(num_hidden_layers=2, tie_word_embeddings=True))
