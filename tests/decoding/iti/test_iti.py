import pytest
import torch

from decoding.decore.decore_cases import ATTENTION, INPUTS, TOKENIZER, make, rows
from modelwright.decoding.iti import (
    HeadDirections,
    InterventionDecoding,
    InterventionOptions,
    fit_directions,
    head_outputs,
)
from modelwright.errors import UserError
from modelwright.models.heads import fingerprint

pytest.importorskip("sklearn")
NEW = 8
TRUE, FALSE = [f"{i} is {i}" for i in range(20)], [f"{i} is {i + 1}" for i in range(20)]


def generate(model, decoding, **keys):
    keys = {**INPUTS, "max_new_tokens": NEW, "do_sample": False, **keys}
    return model.generate(**keys, custom_generate=decoding)


def directions(model, heads=((0, 1), (1, 3))):
    size = 8
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(len(heads), size), dim=-1)
    return HeadDirections(list(heads), vectors, torch.tensor([0.5, 2.0]), torch.tensor([0.9, 0.8]), fingerprint(model))


@pytest.mark.parametrize("family", ATTENTION)
def test_a_shift_of_a_head_is_a_bias_behind_it(family):
    """From the prompt's last token on, the output projection has W_O (a sigma theta) more."""
    model = make(family)
    chosen = directions(model)
    decode = InterventionDecoding(chosen, 3.0)
    found = generate(model, decode)
    assert torch.equal(generate(model, decode, use_cache=False), found)
    assert not torch.equal(found, generate(model, None))
    assert torch.equal(generate(model, InterventionDecoding(chosen, 0.0)), generate(model, None))
    assert not any(m._forward_pre_hooks for m in model.modules())
    from modelwright.models.heads import head_layers

    layers = head_layers(model)
    ids, mask = rows(["Once upon a time"])
    given = decode.next_token_log_probs(model, ids, mask)

    def bias(layer, shift):
        return lambda module, args, out: (
            out
            + torch.nn.functional.linear(shift, module.weight.T if type(module).__name__ == "Conv1D" else module.weight)
        )

    handles = []
    for (layer, head), vector, sigma in zip(chosen.heads, chosen.directions, chosen.deviations, strict=True):
        shift = torch.zeros(32)
        shift[8 * head : 8 * head + 8] = 3.0 * sigma * vector
        handles.append(layers[layer].output.register_forward_hook(bias(layer, shift)))
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(given, wanted, atol=2e-4, rtol=1e-3)


def test_scoring_from_the_prompt_on_is_what_generation_sees():
    model = make().double()
    decode = InterventionDecoding(directions(model), 3.0)
    ids = INPUTS["input_ids"][:1]
    out = generate(model, decode, input_ids=ids, attention_mask=None, return_dict_in_generate=True, output_logits=True)
    given = decode.next_token_log_probs(model, out.sequences, prompt_lengths=[ids.shape[1]])
    made = torch.stack([logits[0].log_softmax(-1) for logits in out.logits])
    torch.testing.assert_close(given[0, -NEW - 1 : -1], made, atol=1e-8, rtol=1e-6)


def test_directions_are_the_shift_of_the_means_and_probes_are_rated_on_other_texts():
    model = make()
    found = fit_directions(model, TOKENIZER, TRUE, FALSE, seed=1)
    assert sorted(found.heads) == [(layer, head) for layer in range(2) for head in range(4)]
    assert (found.accuracies[:-1] >= found.accuracies[1:]).all()
    outputs = [head_outputs(model, TOKENIZER, texts, batch_size=7) for texts in (TRUE, FALSE)]
    layer, head = found.heads[0]
    shift = (outputs[0].mean(0) - outputs[1].mean(0))[layer, head]
    torch.testing.assert_close(found.directions[0], shift / shift.norm(), atol=1e-5, rtol=1e-4)
    along = torch.cat(outputs)[:, layer, head] @ found.directions[0]
    torch.testing.assert_close(found.deviations[0], along.std(), atol=1e-6, rtol=1e-4)


def test_outputs_do_not_depend_on_the_batch():
    model = make()
    one = torch.cat([head_outputs(model, TOKENIZER, [text]) for text in ("a", "a longer text")])
    torch.testing.assert_close(head_outputs(model, TOKENIZER, ["a", "a longer text"]), one, atol=1e-5, rtol=1e-4)


def test_files(tmp_path):
    model = make()
    found = directions(model)
    found.save(tmp_path / "d.safetensors")
    again = HeadDirections.load(tmp_path / "d.safetensors", model)
    assert again.heads == found.heads
    assert torch.equal(again.directions, found.directions)
    options = InterventionOptions(directions=tmp_path / "d.safetensors", top=1, alpha=2.0)
    decode = options.custom_generate(model, TOKENIZER)
    assert torch.equal(generate(model, decode), generate(model, InterventionDecoding(found.top(1), 2.0)))
    with pytest.raises(UserError, match="fitted on another model"):
        options.custom_generate(make(seed=1), TOKENIZER)
    with pytest.raises(UserError, match="3 heads are wanted"):
        found.top(3)
    (tmp_path / "x").write_text("no")
    with pytest.raises(UserError, match="holds no directions"):
        HeadDirections.load(tmp_path / "x")
    with pytest.raises(UserError, match="at least 4 true"):
        fit_directions(model, TOKENIZER, ["a"], ["b"])
