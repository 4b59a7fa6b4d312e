import pytest
import torch

from decoding.decore.decore_cases import INPUTS, TOKENIZER, make, rows
from modelwright.decoding.context_aware import ContextAwareDecoding, ContextAwareOptions
from modelwright.errors import UserError

WITH = ["It is said: the sky is green. Which colour?", "All grass is red. Grass?"]
WITHOUT = ["Which colour?", "Grass?"]
NEW = 10


def generate(model, decoding, **keys):
    ids, mask = rows(WITH)
    bare, bare_mask = rows(WITHOUT)
    keys = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "without_context_ids": bare,
        "without_context_mask": bare_mask,
        **keys,
    }
    return model.generate(ids, attention_mask=mask, custom_generate=decoding, **keys)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_each_step_is_the_definition(family):
    model = make(family).double()
    out = generate(model, ContextAwareDecoding(1.5), return_dict_in_generate=True, output_logits=True)
    for row in range(2):
        said = out.sequences[row, -NEW:]
        own, bare = (torch.tensor(TOKENIZER(texts[row])["input_ids"]) for texts in (WITH, WITHOUT))
        with torch.no_grad():
            base = model(torch.cat((own, said))[None]).logits[0, -NEW - 1 : -1]
            other = model(torch.cat((bare, said))[None]).logits[0, -NEW - 1 : -1]
        found = torch.stack([logits[row] for logits in out.logits])
        torch.testing.assert_close(found, 2.5 * base - 1.5 * other, atol=1e-9, rtol=1e-8)


def test_without_strength_or_with_the_same_prompt_it_is_greedy_generate():
    model = make()
    ids, mask = rows(WITH)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(model, ContextAwareDecoding(0.0)), plain)
    same = {"without_context_ids": ids, "without_context_mask": mask}
    assert torch.equal(generate(model.double(), ContextAwareDecoding(3.0), **same), plain)


def test_without_a_cache_it_is_the_same_and_several_sequences_share_their_prompts():
    model = make()
    wanted = generate(model, ContextAwareDecoding(1.0))
    assert torch.equal(generate(model, ContextAwareDecoding(1.0), use_cache=False), wanted)
    torch.manual_seed(0)
    several = generate(model, ContextAwareDecoding(1.0), do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert torch.equal(several, wanted.repeat_interleave(3, 0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probabilities_are_those_of_generation(side):
    model = make().double()
    decode = ContextAwareDecoding(1.5, relative_top=0.01)
    out = generate(model, decode, return_dict_in_generate=True, output_logits=True)
    said = out.sequences[:, -NEW:]
    both = []
    for texts in (WITH, WITHOUT):
        own = [[*TOKENIZER(text)["input_ids"], *row.tolist()] for text, row in zip(texts, said, strict=True)]
        width = max(map(len, own))
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        for row, part in enumerate(own):
            at = slice(width - len(part), width) if side == "left" else slice(0, len(part))
            ids[row, at], mask[row, at] = torch.tensor(part), 1
        both.append((ids, mask))
    (ids, mask), (bare, bare_mask) = both
    found = decode.next_token_log_probs(model, ids, mask, without_context_ids=bare, without_context_mask=bare_mask)
    for row in range(2):
        wanted = torch.stack([logits[row].log_softmax(-1) for logits in out.logits])
        real = found[row][mask[row].bool()]
        torch.testing.assert_close(real[-NEW - 1 : -1], wanted, atol=1e-8, rtol=1e-7)
    # What only the text with context has is under the model's own law.
    with torch.no_grad():
        own = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits.log_softmax(-1)
    first = int(mask[0].nonzero()[0])
    torch.testing.assert_close(found[0, first], own[0, first], atol=1e-9, rtol=1e-8)


def test_what_is_missing_is_said():
    model = make()
    decode = ContextAwareOptions(alpha=0.7).custom_generate(model, TOKENIZER)
    assert decode.needs_context
    assert not decode.exact
    with pytest.raises(UserError, match="without its context: give without_context_ids"):
        model.generate(**INPUTS, max_new_tokens=3, custom_generate=decode)
    with pytest.raises(UserError, match="without its context"):
        decode.next_token_log_probs(model, INPUTS["input_ids"])
    with pytest.raises(UserError, match="2 prompts, and 3 without"):
        generate(model, decode, without_context_ids=torch.ones(3, 4, dtype=torch.long), without_context_mask=None)
    with pytest.raises(UserError, match="shape of without_context_ids"):
        generate(model, decode, without_context_mask=torch.ones(2, 99, dtype=torch.long))
    with pytest.raises(UserError, match="0 or more"):
        ContextAwareOptions(alpha=-1.0).custom_generate(model, TOKENIZER)
