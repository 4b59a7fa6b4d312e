import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.editing.subject import encode_pair, encode_prompt, locate
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer
from modelwright.models.tokenizers import train_bpe

BYTES = byte_tokenizer()
BPE = train_bpe(["the capital of Freedonia is Zenda, Freedonia's capital; 東京タワー is in 東京"] * 50, 340)


def word_piece_like(bos=True):
    """A SentencePiece-like tokenizer: a mark before every word, and a first token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "▁", *letters, "▁Zenda", "▁is"])}
    merges = []
    for word in ("▁Zenda", "▁is"):
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            merges.append((word[: end - 1], word[end - 1]))
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


SENTENCES = [
    ("The capital of Freedonia is", "Freedonia"),
    ("Freedonia and Freedonia, Freedonia's capital", "Freedonia"),  # the last of three, with a suffix
    ("東京タワー is in", "東京タワー"),
    ("Does Zoë Müller live in", "Zoë Müller"),
    ("the mayor of 🏙️ is", "🏙️"),
    ("a b a b a", "a"),
]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize(("text", "subject"), SENTENCES)
def test_the_token_completes_the_subjects_last_occurrence(tokenizer, text, subject):
    found = locate(tokenizer, text, subject)
    end = text.rfind(subject) + len(subject)
    assert found.ids == encode_prompt(tokenizer, text)
    # The tokens up to it hold the subject whole, and those before it do not.
    assert tokenizer.decode(found.ids[: found.position + 1]).startswith(text[:end])
    assert not tokenizer.decode(found.ids[: found.position]).startswith(text[:end])


def test_a_suffix_may_be_merged_with_the_subject():
    tokenizer = train_bpe(["Tell Freedonians about it"] * 20, 300)
    text = "Tell Freedonians"
    found = locate(tokenizer, text, "Freedonia")
    assert tokenizer.decode(found.ids[found.position]).endswith("ans")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(min_size=1, max_size=6), st.text(max_size=12))
def test_bytes_and_decoding_agree_on_any_text(before, subject, after):
    text = before + subject + after
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text) or text.rfind(subject) < 0:
        return
    found = locate(BYTES, text, subject)
    assert found.position == len(text[: text.rfind(subject) + len(subject)].encode()) - 1


def test_a_tokenizer_without_offsets_is_decoded():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    assert not slow.is_fast
    for text, subject in SENTENCES:
        found = locate(slow, text, subject)
        assert found.position == len(text[: text.rfind(subject) + len(subject)].encode()) - 1
        assert slow.decode(found.ids) == text


def test_special_tokens_before_a_text_are_counted_once():
    tokenizer = word_piece_like()
    found = locate(tokenizer, "Zenda is", "Zenda")
    assert found.ids[0] == 1
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["<s>", "▁Zenda", "▁is"]
    assert found.position == 1
    # A chat template writes the first token itself.
    assert locate(tokenizer, "<s>Zenda is", "Zenda").ids.count(1) == 1


def test_inside_a_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is Rome?"}], tokenize=False, add_generation_prompt=True
    )
    found = locate(tokenizer, text, "Rome")
    assert tokenizer.decode(found.ids[: found.position + 1]).endswith("Where is Rome")
    head, tail = encode_pair(tokenizer, text, "Italy")
    assert tokenizer.decode(head + tail) == text + "Italy"  # the template's line break is white space enough


def test_the_last_token():
    assert locate(BYTES, "Where is Rome?", "Rome", "last").position == len("Where is Rome?") - 1


@pytest.mark.parametrize("target", ["Zenda", " Zenda"])
def test_one_space_stands_before_a_target(target):
    head, tail = encode_pair(BYTES, "The capital is", target)
    assert BYTES.decode(head) == "The capital is"
    assert BYTES.decode(tail) == " Zenda"
    # A tokenizer that marks words itself gets no second mark.
    tokenizer = word_piece_like()
    head, tail = encode_pair(tokenizer, "The capital is", target)
    assert tokenizer.convert_ids_to_tokens(tail) == ["▁Zenda"]
    assert head == tokenizer("The capital is")["input_ids"]


def test_a_token_across_the_border_is_not_used():
    tokenizer = train_bpe(["is:Zenda"] * 50, 300)
    head, tail = encode_pair(tokenizer, "is:\n", "Zenda")
    assert tokenizer.decode(head) == "is:\n"
    assert tokenizer.decode(tail) == "Zenda"
    merged = train_bpe(["a  b"] * 50, 260)  # a token of two spaces
    head, tail = encode_pair(merged, "a ", " b")
    assert merged.decode(head) == "a "
    assert merged.decode(tail) == " b"


def test_errors():
    with pytest.raises(UserError, match="does not stand in the prompt"):
        locate(BYTES, "Where?", "Rome")
    with pytest.raises(UserError, match="does not stand in the prompt"):
        locate(BYTES, "Where?", "")
    with pytest.raises(UserError, match="fact_token is 'first'"):
        locate(BYTES, "Rome?", "Rome", "first")
    with pytest.raises(UserError, match="target is empty"):
        encode_pair(BYTES, "Rome is", "  ")
