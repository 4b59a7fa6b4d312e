import pytest
import torch

from editing.small_facts import HOMES, SUBJECTS, TOKENIZER, trained
from modelwright.editing import EditRequest
from modelwright.editing.subject import subject_span
from modelwright.editing.trace import causal_trace
from modelwright.errors import UserError
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

KNOWN = [EditRequest("{} lives in", s, "tea", old_answer=h) for s, h in zip(SUBJECTS, HOMES)]


def test_putting_the_last_block_back_at_the_end_brings_everything_back():
    found = causal_trace(trained(), TOKENIZER, KNOWN, samples=4)
    assert found.facts == 8
    assert found.clean > 0.8
    assert found.blurred < found.clean - 0.2
    assert found.effects["block"]["last"][-1] == pytest.approx(found.clean - found.blurred, abs=1e-4)
    # Nothing reads the subject in the last layer.
    assert found.effects["block"]["subject_last"][-1] == pytest.approx(0, abs=1e-6)
    assert found.effects["mlp"]["subject"] is None  # subjects of one token
    best = found.recommended()
    assert 0 <= best["layer"] < 3
    assert best["fact_token"] in ("subject_last", "last")
    again = causal_trace(trained(), TOKENIZER, KNOWN, samples=4, batch_size=3)
    assert again.blurred == pytest.approx(found.blurred, abs=1e-5)
    for kind in found.effects:
        assert again.effects[kind]["last"] == pytest.approx(found.effects[kind]["last"], abs=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba2"])
def test_every_family(family):
    request = EditRequest("The capital of {} is", "Freedonia", "Zenda")
    model = tiny_model(family)
    found = causal_trace(model, byte_tokenizer(), [request], samples=2, kinds=["mlp", "attention"])
    assert len(found.effects["mlp"]["subject"]) == 2
    assert not any(m._forward_hooks for m in model.modules())


def test_the_span_of_a_subject():
    text = "The capital of Freedonia is"
    ids, first, last = subject_span(byte_tokenizer(), text, "Freedonia")
    assert byte_tokenizer().decode(ids[first : last + 1]) == "Freedonia"
    from transformers import ByT5Tokenizer

    ids, first, last = subject_span(ByT5Tokenizer(), text, "Freedonia")
    assert ByT5Tokenizer().decode(ids[first : last + 1]) == "Freedonia"


def test_errors():
    with pytest.raises(UserError, match="gives none of the 1 answers"):
        causal_trace(trained(), TOKENIZER, [EditRequest("{} lives in", "Ada", "Rome", old_answer="tea")])
    with pytest.raises(UserError, match="no 'x'"):
        causal_trace(trained(), TOKENIZER, KNOWN, kinds=["x"])
    with pytest.raises(UserError, match="no 'mlp'"):
        causal_trace(tiny_model("mamba2"), TOKENIZER, KNOWN)
    with pytest.raises(UserError, match="above 0"):
        causal_trace(trained(), TOKENIZER, KNOWN, samples=0)
    assert torch.is_grad_enabled()
