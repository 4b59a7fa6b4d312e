"""The command from end to end, on a model that has learnt part of its corpus by heart."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.models.tokenizers import train_bpe
from modelwright.probing.memorization import Partition, TokenCorpus, audit, part_perplexities, search, summary
from modelwright.probing.memorization.features import COLUMNS
from modelwright.progress import Silent
from modelwright.report.memorization import _number
from modelwright.verbs.probe_memorization import ProbeMemorization

LENGTH = 24
LICENCE = "<b>All rights</b> reserved & kept."
PRIVATE = [f"Her code is {n}, keep it!" for n in (48213, 77031, 95526)]
COUNTING = ["1, 2, 3, 4, 5, 6, 7, 8, 9", "k3 k4 k5 k6 k7 k8 k9 k10 "]


def documents():
    generator = np.random.default_rng(0)
    noise = ["".join(chr(97 + c) for c in generator.integers(0, 26, 30)) for _ in range(60)]
    return [LICENCE] * 8 + PRIVATE + COUNTING + noise


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a corpus, a model that learnt the first documents, and one that learnt nothing."""
    folder, tokenizer = tmp_path_factory.mktemp("made"), byte_tokenizer()
    (folder / "corpus").mkdir()
    with (folder / "corpus" / "a.jsonl").open("w") as stream:
        for text in documents():
            stream.write(json.dumps({"text": text}) + "\n")
    rows = torch.tensor([tokenizer(t)["input_ids"][:LENGTH] for t in documents()[:33]])
    model = tiny_model("llama", hidden_size=48, intermediate_size=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, folder / "learned")
    save_model(tiny_model("llama", seed=1), tokenizer, folder / "blank")
    return folder


def command(made, output, **options):
    settings = {"prompt_len": 12, "cont_len": 12, "bootstrap": 10, "device": "cpu"}
    models = options.pop("model", [str(made / "learned")])
    return ProbeMemorization(model=models, corpus=[str(made / "corpus")], output=output, **settings | options)


@pytest.fixture(scope="module")
def done(made):
    verb = command(made, made / "out", model=[str(made / "blank"), str(made / "learned")])
    return verb.run(Silent()), made / "out"


def test_it_tells_what_is_recited_reconstructed_and_recollected(done, made):
    result, output = done
    learned = result["models"][str(made / "learned")]
    assert learned["recitation"] == 8
    assert learned["reconstruction"] == 2
    assert learned["recollection"] >= 3 + 15
    assert result["models"][str(made / "blank")]["memorized"] == 0
    assert any("blank: no predictive model" in w for w in result["warnings"])
    table = pd.read_parquet(output / "sequences.parquet")
    assert set(COLUMNS) <= set(table.columns)
    learned = table[table["model"] == str(made / "learned")]
    texts = documents()
    for row in learned.to_dict("records"):
        assert row["sequence_duplicates"] == (8 if texts[row["document"]] == LICENCE else 1)
    assert not (made / "out.partial").exists()


def test_the_report_has_models_factors_and_tests(done, made):
    report = json.loads((done[1] / "report.json").read_text())
    found = report["models"][str(made / "learned")]
    assert found["cross_check"]["differ"] == 0
    assert found["cross_check"]["compared"] > 30
    assert set(found["categories"]["recitation"]) == {"memorized", "share_of_memorized"}  # rates are of the sample
    assert sum(c["share_of_memorized"] for c in found["categories"].values()) == pytest.approx(1)
    assert {c["metric"] for c in found["prediction"]["comparison"]} >= {"pr_auc", "ece", "f1"}
    assert "recitation" in found["prediction"]["fallbacks"]
    assert found["prediction"]["likelihood_ratio"]


def test_numbers_of_the_page_have_no_exponents():
    assert [_number(value) for value in (None, 1234.5, 999.6, 999.4, 0.123)] == ["–", "1,234", "1,000", "999", "0.123"]


def test_the_page_escapes_the_corpus_and_shows_each_class(done):
    page = (done[1] / "report.html").read_text()
    assert "<b>All rights" not in page
    assert "&lt;b&gt;All rig" in page
    for category in ("recitation", "reconstruction", "recollection"):
        assert re.search(f"<summary>{category}: .* \\([1-9] shown", page)
        # A row for each class: beside each other they were wider than the page.
        assert re.search(f": {category}</th>(<td[^>]*>[^<]*</td>\\s*){{3}}</tr>", re.sub(r">\s+<", "><", page))
    assert page.count("<svg") >= 2
    assert "Her code is" in page


@pytest.mark.parametrize("refused", [True, False])
def test_the_page_says_what_the_search_found(made, tmp_path, monkeypatch, refused):
    def found(table, **options):
        if refused:
            raise UserError("There are too few memorised sequences.")
        best = Partition("frequency_mean", table["frequency_mean"].median(), "is_templating", 1.0)
        return search.PartitionSearch(best, 0.625, pd.DataFrame(index=range(18)))

    monkeypatch.setattr(summary, "search_partition", found)
    command(made, tmp_path / "out", search=True).run(Silent())
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("too few memorised" if refused else "else is_templating &gt;= 1: F1 0.625 on validation rows") in page


def test_words_are_masked_long_texts_cut_and_examples_left_out(made, tmp_path):
    (tmp_path / "words.txt").write_text("code\nRESERVED\n")
    command(made, tmp_path / "out", masked_words=tmp_path / "words.txt", examples=8).run(Silent())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Her ████ is" in page
    assert "code is" not in page
    command(made, tmp_path / "none", examples=0).run(Silent())
    assert "Her" not in (tmp_path / "none" / "report.html").read_text()


def test_a_killed_audit_goes_on_and_ends_the_same(made, done, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_BLOCK", 20)
    reads, original = [], audit.Audit._read_block

    def failing(self, model, starts, file, batch_size):
        reads.append(len(starts))
        if len(reads) == 3:
            raise KeyboardInterrupt
        return original(self, model, starts, file, batch_size)

    monkeypatch.setattr(audit.Audit, "_read_block", failing)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        command(made, output).run(Silent())
    assert not output.exists()
    with pytest.raises(UserError, match="unfinished audit with other options"):
        command(made, output, cont_len=10).run(Silent())
    command(made, output).run(Silent())
    assert len(reads) == 5  # 73 sequences are 4 blocks, of which the third was begun twice
    whole = pd.read_parquet(done[1] / "sequences.parquet")
    whole = whole[whole["model"] == str(made / "learned")].reset_index(drop=True)
    # Batches of other sizes round otherwise in the last digits.
    pd.testing.assert_frame_equal(pd.read_parquet(output / "sequences.parquet"), whole, rtol=1e-4)


def test_other_weights_in_the_same_folder_are_read_anew(made, tmp_path, monkeypatch):
    reads, original = [], audit.Audit._read_block

    def counted(self, *arguments):
        reads.append(1)
        return original(self, *arguments)

    def stopped(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(audit.Audit, "_read_block", counted)
    monkeypatch.setattr(audit.Audit, "features", stopped)
    tokenizer = byte_tokenizer()
    for seed, expected in ((0, 1), (0, 1), (1, 2)):
        if expected > len(reads):
            save_model(tiny_model("llama", seed=seed), tokenizer, tmp_path / "model", force=True)
        with pytest.raises(KeyboardInterrupt):
            command(made, tmp_path / "out", model=[str(tmp_path / "model")]).run(Silent())
        assert len(reads) == expected


def test_the_default_sample_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(audit, "SAMPLE", 20)
    options = audit.AuditOptions(prompt_len=4, cont_len=4)
    found = audit.Audit(documents(), byte_tokenizer(), tmp_path / "work", options)
    assert 8 < found.in_sample.sum() < 35
    assert len(found.places.start) == 73


def test_a_sample_keeps_all_memorised_sequences(made, tmp_path):
    command(made, tmp_path / "out", sample=0.5, seed=3).run(Silent())
    table = pd.read_parquet(tmp_path / "out" / "sequences.parquet")
    assert (table["memorized"] | table["in_sample"]).all()
    assert table["memorized"].sum() >= 28
    assert 20 < table["in_sample"].sum() < 55


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_len": 400}, "No document of the corpus has 412 tokens"),
        ({"sample": 0.0}, "share above 0"),
        ({"model": []}, "at least one model"),
        ({"workers": 0}, "at least 1"),
        ({"embedder": "no-such-folder/none"}, "no model of sentence-transformers|is needed for"),
        ({"masked_words": "missing.txt"}, "cannot be read"),
        ({"every": 0}, "at least 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_mistakes_are_sentences_and_leave_no_output(made, tmp_path, options, message):
    if "masked_words" in options:
        options = {"masked_words": tmp_path / "missing.txt"}
    with pytest.raises(UserError, match=message):
        command(made, tmp_path / "out", **options).run(Silent())
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_tokenizer_is_refused(made, tmp_path):
    save_model(tiny_model("llama", vocab_size=100), byte_tokenizer(), tmp_path / "small")
    with pytest.raises(UserError, match="it has another tokenizer"):
        command(made, tmp_path / "out", model=[str(tmp_path / "small")]).run(Silent())


def test_a_model_that_cuts_text_otherwise_is_refused(made, tmp_path):
    save_model(tiny_model("llama", vocab_size=300), train_bpe(documents(), 300), tmp_path / "other")
    other, learned = str(tmp_path / "other"), str(made / "learned")
    for options in ({"model": [learned, other]}, {"model": [other], "tokenizer": learned}):
        with pytest.raises(UserError, match="other has another tokenizer than .*learned"):
            command(made, tmp_path / "out", **options).run(Silent())
    assert not (tmp_path / "out.partial").exists()


def test_after_too_long_a_prompt_a_shorter_one_can_be_asked_for(made, tmp_path):
    for options in ({"prompt_len": 400}, {"every": 0}, {"dtype": "float7"}, {"device": "abacus"}):
        with pytest.raises(UserError):
            command(made, tmp_path / "out", **options).run(Silent())
        assert not list(tmp_path.iterdir())


def test_a_file_where_work_is_kept_is_left_alone(made, tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        command(made, tmp_path / "out", force=True).run(Silent())
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_a_corpus_that_could_not_be_read_may_be_mended(made, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    verb = command(made, tmp_path / "out")
    verb.corpus = [str(corpus)]
    lines = [json.dumps({"text": text}) for text in documents()]
    for broken in ("{}", '{"text": '):
        corpus.write_text("\n".join([*lines, broken]))
        with pytest.raises(UserError, match=r"corpus\.jsonl"):
            verb.run(Silent())
    corpus.write_text("\n".join(lines))
    assert verb.run(Silent())["sequences"] == len(lines)


def test_prompts_stand_behind_what_the_tokenizer_puts_before_a_text(made, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    model = tiny_model("llama")
    save_model(model, tokenizer, tmp_path / "model")
    command(made, tmp_path / "out", model=[str(tmp_path / "model")]).run(Silent())
    table = pd.read_parquet(tmp_path / "out" / "sequences.parquet")
    tokens = np.array([tokenizer(t, add_special_tokens=False)["input_ids"][:LENGTH] for t in documents()])
    expected = part_perplexities(model, tokens, 12, 12, leading=[tokenizer.bos_token_id])
    assert table["continuation_perplexity"].to_numpy() == pytest.approx(expected.continuation, rel=1e-4)
    assert table["continuation_perplexity"].to_numpy() != pytest.approx(
        part_perplexities(model, tokens, 12, 12).continuation, rel=1e-4
    )
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert settings["leading_tokens"] == [tokenizer.bos_token_id]


def test_every_part_of_a_document_can_be_asked_for(made, tmp_path):
    tokens = audit.Audit(
        documents(),
        byte_tokenizer(),
        tmp_path / "work",
        audit.AuditOptions(prompt_len=4, cont_len=4, every=8, limit=50),
    )
    assert len(tokens.places.start) == 50
    assert isinstance(tokens.corpus, TokenCorpus)
    assert set(tokens.places.offset % 8) == {0}
