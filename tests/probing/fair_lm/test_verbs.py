"""`modelwright probe token-counts` and `probe token-loss` end to end."""

import json

import pytest
from pyarrow import parquet

from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.models.tokenizers import train_bpe
from modelwright.probing.fair_lm import TokenLossReport, measure_documents
from modelwright.progress import Silent
from modelwright.report.token_loss import render_audit
from modelwright.verbs.probe_token_counts import TokenCountsVerb
from modelwright.verbs.probe_token_loss import TokenLoss

TRAIN = [f"the {word} sat on the mat" for word in ("cat", "dog", "owl")] * 4 + ["a quick fox"]
HELD = ["the zebra sat", "a cat on the mat"]


class Talking(Silent):
    def __init__(self):
        self.said = []

    def message(self, text):
        self.said.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    for name, texts in (("train", TRAIN), ("held", HELD)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    # A table of more rows than the tokenizer has tokens, as many models have.
    for seed in range(2):
        save_model(tiny_model("llama", seed=seed, vocab_size=264), byte_tokenizer(), folder / f"m{seed}")
    save_model(tiny_model("gpt2", vocab_size=280), train_bpe(TRAIN, 280), folder / "other")
    verb = TokenCountsVerb(
        data=[str(folder / "train.jsonl")], tokenizer=str(folder / "m0"), output=folder / "counts.parquet"
    )
    verb.run(Silent())
    return folder


def verb(folder, **keys):
    options = {"model": str(folder / "m0"), "data": [str(folder / "held.jsonl")], "device": "cpu"}
    return TokenLoss(**{**options, "counts": str(folder / "counts.parquet"), **keys})


def test_everything_at_once(folder, tmp_path):
    files = {"output": tmp_path / "o.json", "types": tmp_path / "t.parquet", "page": tmp_path / "p.html"}
    found = verb(folder, **files, against=str(folder / "m1"), earlier=[str(folder / "m1")]).run(Silent())
    expected = measure_documents(tiny_model("llama", vocab_size=264), byte_tokenizer(), HELD).compute()
    assert found["average"] == pytest.approx(expected.average, rel=1e-6)
    assert found["balanced"] == pytest.approx(expected.balanced, rel=1e-6)
    assert found["bins"][0]["label"] == "0"  # the z of zebra is not in the training text
    kept = json.loads(files["output"].read_text())
    assert kept["bins"] == found["bins"]
    assert {"delta_average", "delta_balanced", "delta_ratio", "bins"} <= kept["against"].keys()
    assert set(kept["learning_speed"]) == {"auc", "minmax"}
    rows = parquet.read_table(files["types"]).to_pylist()
    row = next(row for row in rows if row["token"] == "z")
    assert (row["train_count"], row["bin"], row["count"]) == (0, "0", 1)
    assert row["mean_loss"] == row["loss"]
    assert TokenLossReport.from_parquet(files["types"]).average == pytest.approx(found["average"])
    html = files["page"].read_text()
    assert "Loss by bin" in html
    assert "Learning speed" in html
    with pytest.raises(UserError, match="exists already"):
        verb(folder, page=files["page"]).run(Silent())


@pytest.mark.parametrize(("gap", "said"), [(1.25, "1.250 nats above"), (-0.5, "0.500 nats below")])
def test_the_page_says_on_which_side_rare_types_are(folder, tmp_path, gap, said):
    found = verb(folder, output=tmp_path / "o.json").run(Silent()) | {"gap": gap, "software": {}}
    assert said in render_audit(found, tmp_path / "p.html", title="t").read_text()


def test_without_files_the_result_is_what_is_printed(folder):
    found = verb(folder, bootstrap=0).run(Silent())
    assert found["balanced_interval"] is None
    assert found["bins"][0]["low"] is None
    assert "output" not in found
    assert found == verb(folder, bootstrap=0, counts=None, train_data=[str(folder / "train.jsonl")]).run(Silent())


def test_counts_of_another_tokenizer_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="of another tokenizer than the model's"):
        verb(folder, model=str(folder / "other")).run(Silent())
    table = parquet.read_table(folder / "counts.parquet").replace_schema_metadata({})
    parquet.write_table(table, tmp_path / "bare.parquet")
    talking = Talking()
    verb(folder, counts=str(tmp_path / "bare.parquet")).run(talking)
    assert "does not say of which tokenizer" in talking.said[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"counts": None}, "give --counts"),
        ({"train_data": ["x.jsonl"]}, "and not both"),
        ({"counts": "nowhere.parquet"}, "nowhere.parquet does not exist"),
        ({"batch_size": 0}, "--batch-size"),
        ({"bootstrap": -1}, "--bootstrap"),
        ({"limit": -1}, "--limit is .*at least 1"),
        ({"base": 1}, "--base"),
    ],
)
def test_mistakes_are_sentences(folder, keys, message):
    with pytest.raises(UserError, match=message):
        verb(folder, **keys).run(Silent())


def test_a_failure_leaves_no_file(folder, tmp_path, monkeypatch):
    import modelwright.report.token_loss as page

    def broken(*arguments, **keys):
        raise UserError("no page")

    monkeypatch.setattr(page, "render_audit", broken)
    with pytest.raises(UserError, match="no page"):
        verb(folder, output=tmp_path / "o.json", types=tmp_path / "t.parquet", page=tmp_path / "p.html").run(Silent())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="must end in .parquet"):
        verb(folder, types=tmp_path / "t.csv").run(Silent())


def test_counting_says_how_many_types_are_rare(folder, tmp_path):
    options = {"data": [str(folder / "train.jsonl")], "tokenizer": str(folder / "m0")}
    found = TokenCountsVerb(output=tmp_path / "c.parquet", sizes=[259, 280], **options).run(Silent())
    assert found["tokens"] == sum(len(t) + 1 for t in TRAIN)
    assert found["documents"] == len(TRAIN)
    assert 0 < found["share_of_seen"] < found["share_of_vocabulary"] < 1
    assert list(found["sizes"]) == ["259", "280"]
    for keys, message in (
        ({"output": tmp_path / "c.json"}, "must end in .parquet"),
        ({"output": tmp_path / "d.parquet", "coverage": 0.0}, "--coverage"),
        ({"output": tmp_path / "c.parquet"}, "exists already"),
    ):
        with pytest.raises(UserError, match=message):
            TokenCountsVerb(**options, **keys).run(Silent())
    assert [p.name for p in tmp_path.iterdir()] == ["c.parquet"]
