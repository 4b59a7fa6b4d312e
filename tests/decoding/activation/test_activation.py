import math

import pytest
import torch

from decoding.decore.decore_cases import INPUTS, TOKENIZER, make, rows
from modelwright.decoding.activation import ActivationDecoding, ActivationOptions, activation_entropy
from modelwright.decoding.activation import decoding as module
from modelwright.decoding.early_exit import EarlyExit
from modelwright.errors import UserError

NEW = 8


def generate(model, decoding, **keys):
    keys = {**INPUTS, "max_new_tokens": NEW, "do_sample": False, **keys}
    return model.generate(**keys, custom_generate=decoding)


@pytest.mark.parametrize("chunk", [1 << 26, 600])
def test_each_step_is_the_definition(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    model = make(num_hidden_layers=4).double()
    out = generate(model, ActivationDecoding(0.7, info_layer=2), return_dict_in_generate=True, output_logits=True)
    length = INPUTS["input_ids"].shape[1]
    for row in range(2):
        real = out.sequences[row][torch.cat((INPUTS["attention_mask"][row], torch.ones(NEW))).bool()][None]
        prompt = int(INPUTS["attention_mask"][row].sum())
        with torch.no_grad():
            whole = model(real, output_hidden_states=True)
            activations = model.lm_head(whole.hidden_states[2][0, :prompt]).softmax(0)
        entropy = -(activations * activations.log()).sum(0)
        for step, logits in enumerate(out.logits):
            base = whole.logits[0, prompt - 1 + step]
            wanted = base - 0.7 * entropy
            wanted[base.softmax(-1) < 0.1 * base.softmax(-1).max()] = -math.inf
            torch.testing.assert_close(logits[row].softmax(-1), wanted.softmax(-1), atol=1e-9, rtol=1e-6)
    given = ActivationDecoding(0.7, info_layer=2).next_token_log_probs(
        model, out.sequences[:1], prompt_lengths=[length]
    )
    made = torch.stack([logits[0].log_softmax(-1) for logits in out.logits])
    torch.testing.assert_close(given[0, -NEW - 1 : -1], made, atol=1e-8, rtol=1e-6)


def test_without_strength_it_is_greedy_generate():
    model = make()
    plain = generate(model, None)
    assert torch.equal(generate(model, ActivationDecoding(0.0)), plain)
    decode = ActivationDecoding(1.0)
    assert torch.equal(generate(model, decode, use_cache=False), generate(model, decode))
    ids, mask = rows(["short"])
    alone = generate(model, decode, input_ids=ids, attention_mask=mask)
    assert torch.equal(alone[0, -NEW:], generate(model, decode)[1, -NEW:])


def test_entropies_that_are_known():
    model = make()
    exit_ = EarlyExit(model)
    same = torch.randn(1, 1, 32).expand(1, 7, 32)
    with torch.no_grad():
        found = activation_entropy(exit_, same)
    torch.testing.assert_close(found, torch.full((1, 259), math.log(7)), atol=1e-4, rtol=0)


def test_what_is_refused():
    model = make()
    assert (
        ActivationOptions().custom_generate(make(num_hidden_layers=8), TOKENIZER)._exit(make(num_hidden_layers=8))[1]
        == 6
    )
    with pytest.raises(UserError, match="Layer 2 is no early one"):
        ActivationOptions(info_layer=2).custom_generate(model, TOKENIZER)
    with pytest.raises(UserError, match="0 or more"):
        ActivationOptions(alpha=-0.5).custom_generate(model, TOKENIZER)
