import pytest
import torch

from modelwright.editing.contexts import check_contexts, sample_contexts
from modelwright.editing.deltas import Dense
from modelwright.editing.edit import WeightEdit
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.rome import ROME
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


def test_there_are_as_many_as_asked_and_the_seed_decides():
    model = tiny_model("llama")
    found = sample_contexts(model, TOKENIZER, [(3, 2), (5, 1)])
    assert len(found) == 16
    assert found[0] == ""
    assert all(text.endswith(". ") for text in found[1:])
    assert found[1].startswith("The")
    state = torch.random.get_rng_state()
    assert sample_contexts(model, TOKENIZER, [(3, 2), (5, 1)]) == found
    assert torch.equal(state, torch.random.get_rng_state())
    assert sample_contexts(model, TOKENIZER, [(3, 2), (5, 1)], seed=1) != found
    assert sample_contexts(tiny_model("llama", seed=1), TOKENIZER, [(3, 2), (5, 1)]) != found


def test_they_are_those_of_the_model_below_its_edits():
    model = tiny_model("llama")
    editor = ROME()
    plain = editor._contexts(model, TOKENIZER)
    assert len(plain) == 21
    edit = WeightEdit(
        "t", model_fingerprint(model, whole=["lm_head.weight"]), {"lm_head.weight": Dense(torch.randn(259, 32))}
    )
    with edit.applied(model):
        assert ROME()._contexts(model, TOKENIZER) == plain
    # Another model gets its own, from the same editor.
    assert editor._contexts(tiny_model("llama", seed=1), TOKENIZER) != plain


def test_given_ones():
    assert check_contexts(["So. "]) == ["", "So. "]
    with pytest.raises(UserError, match="list of texts"):
        check_contexts("So. ")
