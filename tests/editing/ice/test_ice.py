import pytest
import torch

from modelwright.editing.edit import load_edit
from modelwright.editing.ice import ICE
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
REQUEST = EditRequest("The capital of {} is", "Freedonia", "Zenda")
PREFIX = "New Fact: Q: The capital of Freedonia is A: Zenda\n"


def test_the_prefix_stands_before_the_question():
    edit = ICE().fit(tiny_model("llama"), TOKENIZER, [REQUEST])
    assert edit.prompt("Where is Zenda?") == PREFIX + "Where is Zenda?"
    assert not edit.changes_weights


def test_several_facts_have_a_line_each():
    other = EditRequest("The king of {} is", "Ruritania", " Rudolf ")
    edit = ICE().fit(tiny_model("llama"), TOKENIZER, [REQUEST, other])
    assert edit.prompt("Q") == PREFIX + "New Fact: Q: The king of Ruritania is A: Rudolf\nQ"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_the_model_asked_with_the_prefix(family):
    model = tiny_model(family)
    edit = ICE().fit(model, TOKENIZER, [REQUEST])
    by_hand = torch.tensor([TOKENIZER(PREFIX + "Who?")["input_ids"]])
    before = model(by_hand).logits
    with edit.applied(model):
        asked = torch.tensor([TOKENIZER(edit.prompt("Who?"))["input_ids"]])
        assert torch.equal(model(asked).logits, before)


def test_in_a_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    edit = ICE().fit(tiny_model("llama"), tokenizer, [REQUEST])
    text = tokenizer.apply_chat_template([{"role": "user", "content": edit.prompt("Who?")}], tokenize=False)
    assert text == f"[user] {PREFIX}Who?\n[assistant]"


def test_it_fits_any_model_and_is_saved(tmp_path):
    edit = ICE().fit(tiny_model("llama"), TOKENIZER, [REQUEST])
    edit.save(tmp_path / "edit")
    loaded = load_edit(tmp_path / "edit")
    assert loaded.prompt("Who?") == edit.prompt("Who?")
    with loaded.applied(tiny_model("gpt2", seed=3)):
        pass


def test_contradicting_facts_are_refused():
    with pytest.raises(UserError, match="contradict"):
        ICE().fit(
            tiny_model("llama"), TOKENIZER, [REQUEST, EditRequest("The capital of {} is", "Freedonia", "Strelsau")]
        )
