"""Tokenizers: lossless on any text, and the same whoever trains them."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.models.loading import load_tokenizer
from modelwright.models.tokenizers import byte_tokenizer, encode, leading_ids, prefix_ids, train_bpe

TEXTS = [f"the {a} {b} sat on the {a} mat, naïvely.\n" for a in ("cat", "dog", "Ω") for b in ("old", "new", "big")]
BYTES, BPE = byte_tokenizer(), train_bpe(TEXTS, 300)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=50))
def test_every_text_comes_back(text):
    for special in BYTES.all_special_tokens:
        text = text.replace(special, "")
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(encode(tokenizer, [text])[0]) == text
    assert len(encode(BYTES, [text])[0]) == len(text.encode())


def test_sizes():
    assert len(BYTES) == 259
    assert 259 < len(BPE) <= 300
    with pytest.raises(UserError, match="too small"):
        train_bpe(TEXTS, 100)
    with pytest.raises(UserError, match="min_frequency is -1"):
        train_bpe(TEXTS, 300, min_frequency=-1)
    with pytest.raises(UserError, match="no text"):
        train_bpe([], 300)


def test_saves_and_loads(tmp_path):
    BPE.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == BPE.get_vocab()
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id, again.padding_side) == (0, 1, 2, "left")
    assert encode(again, TEXTS) == encode(BPE, TEXTS)


def test_the_prefix_is_the_tokenizers_own_or_the_end_token():
    assert leading_ids(BYTES) == []
    assert prefix_ids(BYTES) == [2]
    from tokenizers import processors

    own = byte_tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    assert prefix_ids(own) == [1]


@pytest.mark.slow
def test_training_is_deterministic_across_processes_and_threads():
    code = (
        "from modelwright.models.tokenizers import train_bpe; import hashlib;"
        "t = train_bpe((f'{i * 7919 % 1000} word{i % 37} tie{i % 5}' for i in range(3000)), 700);"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    seen = set()
    for threads, hash_seed in (("1", "1"), ("2", "2")):
        env = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed, "PATH": "", "TOKENIZERS_PARALLELISM": "true"}
        seen.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(seen) == 1
