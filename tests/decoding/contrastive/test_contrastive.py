import math

import pytest
import torch

from decoding.decore.decore_cases import INPUTS, TOKENIZER, make, rows
from modelwright.decoding.contrastive import ContrastiveDecoding, ContrastiveOptions
from modelwright.errors import UserError
from modelwright.models.loading import save_model

NEW = 10


def generate(model, decoding, **keys):
    keys = {**INPUTS, "max_new_tokens": NEW, "do_sample": False, **keys}
    return model.generate(**keys, custom_generate=decoding)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_each_step_is_the_definition(alpha):
    model, amateur = make().double(), make("gpt_neox", seed=4).double()
    out = generate(
        model, ContrastiveDecoding(amateur, alpha, temperature=0.5), return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        base = model(out.sequences[:1]).logits[0, -NEW - 1 : -1].log_softmax(-1)
        other = (amateur(out.sequences[:1]).logits[0, -NEW - 1 : -1] / 0.5).log_softmax(-1)
    wanted = base - other if alpha is None else 1.5 * base - 0.5 * other
    wanted[base < base.max(-1, keepdim=True).values + math.log(0.1)] = -math.inf
    found = torch.stack([logits[0] for logits in out.logits])
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1), atol=1e-9, rtol=1e-7)
    ids, mask = out.sequences, torch.ones_like(out.sequences)
    mask[:, : INPUTS["attention_mask"].shape[1]] = INPUTS["attention_mask"]
    given = ContrastiveDecoding(amateur, alpha, temperature=0.5).next_token_log_probs(model, ids, mask)
    for row in range(2):
        made = torch.stack([logits[row].log_softmax(-1) for logits in out.logits])
        torch.testing.assert_close(given[row, -NEW - 1 : -1], made, atol=1e-8, rtol=1e-6)


def test_an_amateur_that_is_the_model_says_nothing():
    model = make()
    plain = generate(model, None)
    assert torch.equal(generate(model, ContrastiveDecoding(model, 2.0)), plain)
    assert torch.equal(generate(model, ContrastiveDecoding(make(seed=3), 0.0)), plain)
    decode = ContrastiveDecoding(make(seed=3), 1.0)
    assert torch.equal(generate(model, decode, use_cache=False), generate(model, decode))


def test_padding_changes_nothing():
    model = make().double()
    decode = ContrastiveDecoding(make(seed=3).double())
    together = generate(model, decode)
    ids, mask = rows(["short"])
    assert torch.equal(generate(model, decode, input_ids=ids, attention_mask=mask)[0, -NEW:], together[1, -NEW:])


def test_an_amateur_from_a_folder_and_what_is_refused(tmp_path):
    model, amateur = make(), make(seed=3)
    save_model(amateur, TOKENIZER, tmp_path / "amateur")
    found = ContrastiveOptions(amateur=str(tmp_path / "amateur"), alpha=1.0).custom_generate(model, TOKENIZER)
    assert torch.equal(generate(model, found), generate(model, ContrastiveDecoding(amateur, 1.0)))
    with pytest.raises(UserError, match="The amateur has 300 tokens and the model 259"):
        generate(model, ContrastiveDecoding(make(vocab_size=300)))
    with pytest.raises(UserError, match="temperature is 0"):
        ContrastiveDecoding(amateur, temperature=0)


@pytest.mark.parametrize("size", [256, 300])
def test_tables_of_one_tokenizer_that_were_padded_differently(size):
    model, amateur = make().double(), make(vocab_size=size, seed=3).double()
    decode = ContrastiveDecoding(amateur, relative_top=None, pad_vocabulary=True)
    ids, common = INPUTS["input_ids"][:1], min(size, 259)
    found = decode.next_token_log_probs(model, ids)
    with torch.no_grad():
        wanted = model(ids).logits[..., :common] - amateur(ids).logits[..., :common]
    torch.testing.assert_close(found[..., :common], wanted.log_softmax(-1), atol=1e-9, rtol=1e-9)
    assert found.shape[-1] == 259
    assert (found[..., common:] == -math.inf).all()
    assert generate(model, decode).shape[1] == INPUTS["input_ids"].shape[1] + NEW
