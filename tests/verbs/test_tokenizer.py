"""The verb writes a folder that loads, whichever the method."""

import pytest

from modelwright.errors import UserError
from modelwright.models.loading import load_tokenizer
from modelwright.progress import Silent
from modelwright.verbs import load_verb

TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 30


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.txt").write_text(TEXT)
    return ["pool.txt"]


@pytest.mark.parametrize("options", [{}, {"method": "swe"}, {"method": "swe", "refine": "em"}])
def test_trains(data, tmp_path, options):
    verb = load_verb("tokenize train")
    result = verb(data=data, output=tmp_path / "out", vocab_size=270, **options).run(Silent())
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer) == result["vocab_size"] == 270
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert result["characters_per_token"] == pytest.approx(len(TEXT) / len(tokenizer(TEXT)["input_ids"]), abs=1e-3)
    assert result["bytes"] == len(TEXT)
    assert 0 < result["bits_per_character"] < 5


@pytest.mark.parametrize("method", ["bpe", "swe"])
def test_a_vocabulary_smaller_than_asked_for_is_spoken_of(data, tmp_path, method):
    class Said(Silent):
        text = ""

        def message(self, text):
            self.text += text

    for size in (270, 4000):
        said = Said()
        verb = load_verb("tokenize train")(data=data, output=tmp_path / str(size), vocab_size=size, method=method)
        found = verb.run(said)["vocab_size"]
        assert (f"has {found} tokens, not 4,000" in said.text) == (found < size) == (size == 4000)


def test_options_of_another_method_are_refused(data, tmp_path):
    verb = load_verb("tokenize train")
    for options in ({"refine": "em"}, {"prune_from": 300}):
        with pytest.raises(UserError, match="--method swe"):
            verb(data=data, output=tmp_path / "out", vocab_size=270, **options).run(Silent())
    with pytest.raises(UserError, match="alphabet"):
        verb(data=data, output=tmp_path / "out", vocab_size=100, method="swe").run(Silent())
    with pytest.raises(UserError, match="limit is -1"):
        verb(data=data, output=tmp_path / "out", vocab_size=270, limit=-1).run(Silent())
    assert not (tmp_path / "out").exists()


def test_texts_that_begin_with_many_empty_ones(data, tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"text": ""}\n' * 201 + '{"text": "the cat sat"}\n')
    result = load_verb("tokenize train")(data=["pool.jsonl"], output=tmp_path / "out", vocab_size=262).run(Silent())
    assert result["documents"] == 202
    assert result["bytes_per_token"] > 0
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no text"):
        load_verb("tokenize train")(data=["empty.jsonl"], output=tmp_path / "none").run(Silent())
    assert not (tmp_path / "none").exists()
