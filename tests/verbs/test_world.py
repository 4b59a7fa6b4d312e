import json

import pytest
from datasets import Image, load_dataset

from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.verbs.world import World
from modelwright.worlds import WORLDS, make_world
from modelwright.worlds.pictures import from_png

SMALL = {
    "stdlib_text": {"pool_chunks": 300},
    "domains": {"pool_size": 20},
    "graded": {"level_size": 10},
    "facts": {"people": 10},
    "analogies": {"sentences": 20, "questions": 5},
    "memorized": {"copies": [1, 2], "bases": [8, 4], "templates": 5},
    "retrieval": {"lengths": [400]},
    "pictures": {"pool_size": 30, "reference_size": 5, "heldout_size": 5},
    "fact_pairs": {"people": 10, "reference_size": 5},
    "task_stream": {"tasks": 2, "train_rows": 20, "test_rows": 8},
    "copying": {"needles": 2, "haystacks": 2, "sentences": 30},
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_folder_holds_the_world(name, tmp_path, tmp_path_factory):
    verb = World(name=name, output=tmp_path / "w", seed=2, set=SMALL[name])
    result = verb.run(Silent())
    world = make_world(name, 2, SMALL[name])
    saved = json.loads((tmp_path / "w" / "world.json").read_text(encoding="utf-8"))
    assert result["fingerprint"] == saved["fingerprint"] == world.fingerprint()
    assert saved["parameters"] == json.loads(json.dumps(world.parameters))
    assert saved["truth"] == json.loads(json.dumps(world.truth))
    assert saved["counts"] == result["counts"] == world.counts
    assert json.dumps(result)
    for split, rows in world.splits().items():
        if name == "pictures":
            file, cache = str(tmp_path / "w" / f"{split}.parquet"), str(tmp_path_factory.mktemp("cache"))
            saved = load_dataset("parquet", data_files=file, split="train", cache_dir=cache)
            assert isinstance(saved.features["image"], Image)
            raw = saved.cast_column("image", Image(decode=False)).to_list()
            assert [{**row, "image": row["image"]["bytes"]} for row in raw] == rows
            assert [row["image"]["path"] for row in raw] == [f"{row['id']}.png" for row in rows]
            assert saved[0]["image"].tobytes() == from_png(rows[0]["image"]).tobytes()
            continue
        lines = (tmp_path / "w" / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        assert lines.pop() == ""
        assert [json.loads(line) for line in lines] == rows
    assert {p.name for p in tmp_path.iterdir()} == {"w"}


def test_an_output_that_exists_is_kept(tmp_path):
    World(name="domains", output=tmp_path / "w", set={"pool_size": 5}).run(Silent())
    before = (tmp_path / "w" / "world.json").read_text()
    with pytest.raises(UserError, match="--force"):
        World(name="domains", output=tmp_path / "w").run(Silent())
    assert (tmp_path / "w" / "world.json").read_text() == before
    World(name="facts", output=tmp_path / "w", set={"people": 5}, force=True).run(Silent())
    assert json.loads((tmp_path / "w" / "world.json").read_text())["world"] == "facts"
    assert not (tmp_path / "w" / "pool.jsonl").exists()


@pytest.mark.parametrize("options", [{"name": "fact"}, {"name": "facts", "set": {"peeple": 1}}])
def test_bad_names_leave_nothing(options, tmp_path):
    with pytest.raises(UserError, match="did you mean"):
        World(output=tmp_path / "w", **options).run(Silent())
    assert not list(tmp_path.iterdir())


def test_tokens_of_a_saved_tokenizer(tmp_path):
    from modelwright.models.tiny import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = {"unit": "tokens", "tokenizer": str(tmp_path / "tokenizer"), "lengths": 500, "train_per_cell": 1}
    World(name="retrieval", output=tmp_path / "w", set=options).run(Silent())
    rows = [json.loads(line) for line in (tmp_path / "w" / "train.jsonl").read_text().splitlines()]
    assert {len(byte_tokenizer()(row["prompt"])["input_ids"]) for row in rows} == {500}
