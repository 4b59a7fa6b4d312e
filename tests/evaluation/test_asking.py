"""Questions are laid out as each kind of model expects, and an edit of the prompt stands where it should."""

from pathlib import Path

import pytest

from modelwright.editing.editor import make_editor
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout, Turn, answers, clean, layout_for
from modelwright.evaluation.editors import describe, editors_by_name, laid_out, writes_prompt
from modelwright.models.tiny import byte_tokenizer, tiny_model

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"  # noqa: E501


def ice():
    return make_editor("ice").fit(tiny_model("llama"), None, [EditRequest("Where is {}?", "Bo", "Rome")])


def test_layouts():
    tokenizer = byte_tokenizer()
    turns = [Turn("Where is Bo?", "Rome"), Turn("Sure?")]
    assert Layout(kind="qa").text(tokenizer, turns) == "Q: Where is Bo?\nA: Rome\nQ: Sure?\nA:"
    assert Layout(kind="raw").text(tokenizer, turns[1:]) == "Sure?"
    tokenizer.chat_template = CHAT
    assert layout_for(tokenizer).kind == "chat"
    text = Layout(kind="chat").text(tokenizer, turns, system="short")
    assert text == "<system>short<user>Where is Bo?<assistant>Rome<user>Sure?<assistant>"


def test_a_template_without_system_messages_has_it_in_the_users():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    assert Layout(kind="chat").text(tokenizer, [Turn("Where?")], system="short") == "<user>short Where?<assistant>"


def test_an_edit_of_the_prompt_stands_before_the_first_question():
    tokenizer, edit = byte_tokenizer(), ice()
    fact = "New Fact: Q: Where is Bo? A: Rome\n"
    assert Layout(kind="qa").text(tokenizer, [Turn("Who?")], [edit]) == f"{fact}Q: Who?\nA:"
    tokenizer.chat_template = CHAT
    text = Layout(kind="chat").text(tokenizer, [Turn("Who?", "I"), Turn("Sure?")], [edit], system=None)
    assert text == f"<user>{fact}Who?<assistant>I<user>Sure?<assistant>"


def test_answers_are_in_order_whatever_the_batch():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    prompts = ["a long prompt with many words", "b", "something between"]
    layout = Layout(kind="raw", new_tokens=6)
    together = answers(model, tokenizer, prompts, layout, batch_size=3)
    assert together == [answers(model, tokenizer, [p], layout)[0] for p in prompts]
    assert together == answers(model, tokenizer, prompts, layout, use_cache=False)


def test_an_answer_is_one_line_without_its_full_stop():
    assert clean(" Rome.\nQ: and", Layout(kind="qa")) == "Rome"
    assert clean(" Rome.\nItaly. ", Layout(kind="chat")) == "Rome. Italy"


def test_bad_layouts():
    with pytest.raises(UserError, match="no layout 'chta'"):
        layout_for(byte_tokenizer(), "chta")
    with pytest.raises(UserError, match="no chat template"):
        layout_for(byte_tokenizer(), "chat")


def test_editors_by_name_with_options():
    found = editors_by_name(["ft-m,ICE"], {"ft-m.layer": "1"})
    assert list(found) == ["ft-m", "ice"]
    assert found["ft-m"].layer == 1
    assert "layer=1" in describe(found["ft-m"])
    assert describe(found["ft-m"]) == describe(editors_by_name(["ft-m"], {"ft-m.layer": 1})["ft-m"])
    one, other = (make_editor("mend") for _ in range(2))
    one.trained, other.trained = Path("one"), Path("other")
    assert describe(one) != describe(other)
    with pytest.raises(UserError, match=r"is for no editor here"):
        editors_by_name(["ft-m"], {"rome.layer": 1})
    with pytest.raises(UserError, match="No editor is named"):
        editors_by_name([","])


def test_a_request_is_asked_as_it_will_be():
    request, cloze = EditRequest("Where is {}?", "Bo", "Rome"), EditRequest("{} is in", "Bo", "Rome")
    layout, editors = Layout(kind="qa"), editors_by_name(["ft-m", "ice"])
    assert writes_prompt(editors["ice"])
    assert [r.text for r in laid_out([request, cloze], editors["ft-m"], layout)] == ["Q: Where is Bo?\nA:", "Bo is in"]
    assert [r.text for r in laid_out([request], editors["ice"], layout)] == ["Where is Bo?"]
