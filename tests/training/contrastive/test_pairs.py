"""Pairs from every kind of source: the same pairs, named faults, nothing read before it is asked for."""

import io
import json
import pickle
import tarfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.training.contrastive import images
from modelwright.training.contrastive.images import to_rgb
from modelwright.training.contrastive.pair_sources import find_fields
from modelwright.training.contrastive.pairs import pairs_of, read_pairs

CAPTIONS = ["a red one", "ein grünes", "blue", "grey", "white"]
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (100, 100, 100), (255, 255, 255)]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def png(colour, size=(8, 6)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "png")
    return stream.getvalue()


def write_images(folder):
    folder.mkdir(exist_ok=True)
    for number, colour in enumerate(COLOURS):
        (folder / f"{number}.png").write_bytes(png(colour))


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face image folder."""
    write_images(tmp_path / "data")
    rows = [
        {"file_name": f"{i}.png", "text": caption, "clean": i != 2, "ref": [i / 2, -1.0, 3.0], "n": i, "tag": "x"}
        for i, caption in enumerate(CAPTIONS)
    ]
    write_jsonl(tmp_path / "data" / "metadata.jsonl", rows)
    return tmp_path / "data"


def text_rows(count=4):
    return [
        {"query": f"question {i}", "positive": f"answer {i}", "negatives": [f"no {i}", "nor"]} for i in range(count)
    ]


def colours(pairs):
    return [pair["query"].getpixel((0, 0)) for pair in pairs]


# Sources


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        for number, (colour, caption) in enumerate(zip(COLOURS, CAPTIONS)):
            told = json.dumps({"caption": caption.upper()}).encode()
            for ending, content in (("png", png(colour)), ("txt", caption.encode()), ("json", told)):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def as_image_folder(path):
    write_images(path)
    rows = [{"file_name": f"{i}.png", "text": c} for i, c in enumerate(CAPTIONS)]
    write_jsonl(path / "metadata.jsonl", rows)
    return path


def as_csv(path):
    write_images(path)
    lines = "".join(f"{i}.png,{c}\n" for i, c in enumerate(CAPTIONS))
    (path / "pairs.csv").write_text("image,caption\n" + lines, encoding="utf-8")
    return path / "pairs.csv"


def as_json(path):
    write_images(path)
    rows = [{"image": f"{i}.png", "caption": c} for i, c in enumerate(CAPTIONS)]
    (path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    return path / "pairs.json"


def as_parquet_of_bytes(path):
    path.mkdir()
    table = pyarrow.table({"jpg": [png(c) for c in COLOURS], "txt": CAPTIONS})
    pyarrow.parquet.write_table(table, path / "a.parquet")
    return path


def with_image_feature():
    data = {"image": [Image.new("RGB", (8, 6), c) for c in COLOURS], "text": CAPTIONS}
    return datasets.Dataset.from_dict(data)


def as_parquet_of_the_library(path):
    path.mkdir()
    with_image_feature().to_parquet(path / "a.parquet")
    return path / "*.parquet"


def as_saved(path):
    with_image_feature().save_to_disk(path)
    return path


def as_saved_splits(path):
    datasets.DatasetDict({"train": with_image_feature()}).save_to_disk(path)
    return path


def as_tar(path):
    path.mkdir()
    return write_tar(path / "a.tar")


def as_tar_pattern(path):
    path.mkdir()
    write_tar(path / "shard-0.tar")
    return path / "shard-*.tar"


@pytest.mark.parametrize(
    "make",
    [
        as_image_folder,
        as_csv,
        as_json,
        as_parquet_of_bytes,
        as_parquet_of_the_library,
        as_saved,
        as_saved_splits,
        as_tar,
        as_tar_pattern,
    ],
)
def test_every_source_of_images_gives_the_same_pairs(make, tmp_path):
    source = make(tmp_path / "data")
    pairs = read_pairs(source)
    assert pairs.kind == "image-text"
    assert [pair["key"] for pair in pairs] == CAPTIONS
    assert colours(pairs) == COLOURS
    assert pairs[1]["negatives"] == []
    assert pairs.check_images(workers=2) == []
    assert read_pairs([source]).fingerprint() == pairs.fingerprint()


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_every_source_of_texts_gives_the_same_pairs(ending, tmp_path):
    import gzip

    path = tmp_path / f"pairs.{ending}"
    rows = [
        {"anchor": "None", "positive": "a, b\n", "negative_1": "1", "negative_2": '"'},
        {"anchor": "7", "positive": "NA", "negative_1": "0012", "negative_2": "null"},
    ]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in ("csv", "tsv"):
        import csv

        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    pairs = read_pairs(path)
    assert pairs.kind == "text-text"
    assert list(pairs) == [
        {"query": "None", "key": "a, b\n", "negatives": ["1", '"']},
        {"query": "7", "key": "NA", "negatives": ["0012", "null"]},
    ]


def test_several_sources_with_fields_and_folders_of_their_own(folder, tmp_path):
    other = as_csv(tmp_path / "other")
    pairs = read_pairs([folder, other, as_tar(tmp_path / "tar")])
    assert [p["key"] for p in pairs] == CAPTIONS * 3
    assert colours(pairs) == COLOURS * 3
    assert pairs.name(5) == f"{other}:2"
    assert pairs[-1]["key"] == CAPTIONS[-1]
    mixed = pairs.rows([12, 0, 7, 0])
    assert [p["key"] for p in mixed] == [CAPTIONS[i] for i in (2, 0, 2, 0)]
    with pytest.raises(IndexError):
        pairs[15]
    texts = write_jsonl(tmp_path / "texts.jsonl", text_rows())
    with pytest.raises(UserError, match="texts with texts: train on one"):
        read_pairs([folder, texts])


def test_base_is_where_paths_of_images_start(folder, tmp_path):
    path = write_jsonl(tmp_path / "apart" / "pairs.jsonl", [{"image": "1.png", "caption": "x"}])
    assert read_pairs(path, base=folder)[0]["query"].getpixel((0, 0)) == COLOURS[1]
    with pytest.raises(UserError, match=r"pairs.jsonl:1 has an image \(1.png\) that does not exist"):
        read_pairs(path)[0]
    absolute = write_jsonl(tmp_path / "b.jsonl", [{"image": str(folder / "2.png"), "caption": "x"}])
    assert read_pairs(absolute)[0]["query"].getpixel((0, 0)) == COLOURS[2]


def test_names_that_look_like_patterns(tmp_path):
    path = write_jsonl(tmp_path / "run[1]*" / "a?.jsonl", text_rows())
    assert len(read_pairs(path)) == 4
    assert len(read_pairs(path.parent)) == 4


def test_field_of_an_object(tmp_path):
    pairs = read_pairs(write_tar(tmp_path / "a.tar"), key_field="json.caption")
    assert [p["key"] for p in pairs] == [c.upper() for c in CAPTIONS]


@pytest.mark.parametrize(
    ("columns", "asked", "images", "expected"),
    [
        ("id image text", (), "", ("image", "text", (), True)),
        ("url JPG Caption", (), "", ("JPG", "Caption", (), True)),
        ("pixels caption", (), "pixels", ("pixels", "caption", (), True)),
        ("question answer", (), "", ("question", "answer", (), False)),
        (
            "anchor positive negative_10 negative_2",
            (),
            "",
            ("anchor", "positive", ("negative_2", "negative_10"), False),
        ),
        ("sentence1 sentence2 label", (), "", ("sentence1", "sentence2", (), False)),
        ("query text", (), "", ("query", "text", (), False)),
        ("a b c", ("a", "b"), "", ("a", "b", (), False)),
        ("image a b", (None, "b"), "", ("image", "b", (), True)),
        ("q p hard_1 hard_2", ("q", "p", "hard"), "", ("q", "p", ("hard_1", "hard_2"), False)),
        ("image text question answer", ("question", "answer"), "", ("question", "answer", (), False)),
    ],
)
def test_fields_are_found_by_name(columns, asked, images, expected):
    found = find_fields(columns.split(), (*asked, None, None, None)[:3], images.split(), "x")
    assert (found.query, found.key, found.negatives, found.image) == expected


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ("id body", (), r"looks like an image or a query \(fields: id, body\).*--query-field"),
        ("image label", (), r"text that belongs to 'image' \(fields: image, label\).*--key-field"),
        ("image text question answer", (), "images .*and pairs of texts .*say which"),
        ("image text", ("imge",), "no field 'imge'.*did you mean 'image'"),
        ("image text", (None, "zzz"), r"no field 'zzz' \(fields: image, text\)\."),
        ("query positive", (None, None, "hard"), "no field 'hard'"),
    ],
)
def test_fields_that_are_missing_or_unclear(columns, asked, message):
    with pytest.raises(UserError, match=message):
        find_fields(columns.split(), (*asked, None, None, None)[:3], [], "x")


# What can be done with pairs


def test_columns_subsets_and_fingerprints(folder):
    pairs = read_pairs(folder)
    assert pairs.column_names == ["file_name", "text", "clean", "ref", "n", "tag"]
    assert pairs.column("clean").tolist() == [True, True, False, True, True]
    assert pairs.column("ref").shape == (5, 3)
    assert pairs.column("n").dtype == np.int64
    some = pairs.select(np.array([3, 0, -1]))
    assert len(some) == 3
    assert [p["key"] for p in some] == [CAPTIONS[i] for i in (3, 0, 4)]
    assert some.column("n").tolist() == [3, 0, 4]
    assert some.select([2, 2]).column("ref")[:, 0].tolist() == [2.0, 2.0]
    assert some.name(0) == f"{folder / 'metadata.jsonl'}:4"
    hashes = {pairs.fingerprint(), some.fingerprint(), some.select([0]).fingerprint()}
    hashes.add(read_pairs(folder, key_field="file_name").fingerprint())
    assert len(hashes) == 4
    with pytest.raises(IndexError):
        pairs.select([5])
    for name, message in (("nix", "no column 'nix'"), ("tag", "holds string, not numbers")):
        with pytest.raises(UserError, match=message):
            pairs.column(name)


def test_fingerprint_changes_with_the_file(folder):
    before = read_pairs(folder).fingerprint()
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("blue", "navy"))
    after = read_pairs(folder)
    assert after.fingerprint() != before
    assert after[2]["key"] == "navy"


def test_columns_that_are_no_table_of_numbers(tmp_path):
    rows = [{"query": "a", "positive": "b", "ragged": [1.0], "half": 1.0}, text_rows()[0] | {"ragged": [1.0, 2.0]}]
    pairs = read_pairs(
        write_jsonl(tmp_path / "a.jsonl", [{k: v for k, v in r.items() if k != "negatives"} for r in rows])
    )
    with pytest.raises(UserError, match="1 to 2 numbers"):
        pairs.column("ragged")
    with pytest.raises(UserError, match="1 rows have no value"):
        pairs.column("half")


def test_pairs_travel_to_workers_cheaply(folder, tmp_path):
    path = write_jsonl(tmp_path / "many.jsonl", [{"query": f"q {i}", "positive": "x" * 100} for i in range(20_000)])
    many = read_pairs(path)
    sent = pickle.dumps(many)
    assert len(sent) < 10_000
    again = pickle.loads(sent)
    assert again[19_999] == many[19_999]
    assert again.fingerprint() == many.fingerprint()
    assert colours(pickle.loads(pickle.dumps(read_pairs(folder).select([1, 2])))) == COLOURS[1:3]


def test_images_are_decoded_only_when_asked_for(folder, monkeypatch):
    seen = []
    decode = images.decode
    monkeypatch.setattr("modelwright.training.contrastive.pairs.decode", lambda *a: seen.append(a[0]) or decode(*a))
    pairs = read_pairs(folder)
    pairs.column("ref"), pairs.fingerprint(), pairs.select([1]), pairs.identities(), pairs.name(2)
    assert seen == []
    pairs.rows([3, 1])
    assert seen == ["3.png", "1.png"]


def test_pairs_of_a_data_set_in_memory():
    data = with_image_feature().select([4, 2])
    pairs = pairs_of(data)
    assert colours(pairs) == [COLOURS[4], COLOURS[2]]
    assert pairs.name(1) == "the data set: row 2"
    assert pairs.fingerprint() == pairs_of(data).fingerprint() != pairs_of(data.select([0])).fingerprint()
    assert data.features["image"].decode  # the caller's data set stays as it was
    with pytest.raises(UserError, match="IterableDataset"):
        pairs_of(data.to_iterable_dataset())


def test_identities_tell_images_and_texts_apart(folder):
    pairs = read_pairs(folder)
    names = [query for query, _ in pairs.identities()]
    assert len(set(names)) == 5
    twice = pairs_of(datasets.concatenate_datasets([with_image_feature()] * 2)).identities()
    assert twice[:5] == twice[5:]
    assert len({query for query, _ in twice}) == 5


# Images


def test_every_mode_becomes_three_channels():
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert to_rgb(transparent).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)
    palette = transparent.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (4, 4), (7, 255))).getpixel((0, 0)) == (7, 7, 7)
    assert to_rgb(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (128, 128, 128)
    plain = Image.new("RGB", (4, 4))
    assert to_rgb(plain) is plain


def test_images_are_turned_upright_as_exif_says(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "turned.jpg", "text": "x"}])
    assert read_pairs(path)[0]["query"].size == (4, 8)


def test_bad_images_are_named_and_can_be_dropped(folder, monkeypatch):
    (folder / "0.png").write_bytes(png((1, 2, 3), (64, 64))[:-40])
    (folder / "1.png").write_text("no image")
    (folder / "2.png").unlink()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[3]["text"] = "  "
    write_jsonl(folder / "metadata.jsonl", rows)
    with pytest.raises(UserError, match="metadata.jsonl:4 has a blank text in the field 'text'"):
        read_pairs(folder)
    pairs = read_pairs(folder, bad_texts="keep")
    with pytest.raises(UserError, match=r"metadata.jsonl:1 has an image \(0.png\) that is truncated: mend or remove"):
        pairs[0]
    counted = []

    class Counting(Silent):
        def advance(self, units=1, note=""):
            counted.append(units)

    bad = pairs.check_images(Counting(), workers=3)
    assert sum(counted) == 5
    assert [(b.index, b.name.rsplit(":", 1)[1]) for b in bad] == [(0, "1"), (1, "2"), (2, "3"), (3, "4")]
    assert [b.reason for b in bad] == [
        "has an image (0.png) that is truncated",
        "has an image (1.png) that is not an image of a known format",
        "has an image (2.png) that does not exist",
        "has a blank text in the field 'text'",
    ]
    good, same = pairs.without_bad()
    assert same == bad
    assert [p["key"] for p in good] == ["white"]
    with pytest.raises(UserError, match="None of 2 pairs can be used: .*truncated"):
        pairs.select([0, 1]).without_bad()


def test_pillows_limit_on_pixels_holds(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match="more pixels than Pillow allows"):
        read_pairs(folder)[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "is missing"), ("", "is missing"), ("http://a.b/c.png", "on the network"), ("data", "is not a file")],
)
def test_images_that_are_no_files(folder, tmp_path, value, message):
    rows = [{"image": str(folder / "1.png"), "text": "a"}, {"image": value, "text": "b"}]
    pairs = read_pairs(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=f"a.jsonl:2 has an image.*{message}"):
        pairs[1]


# Faults of texts and files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no pairs"),
        ("\n\n", "holds no pairs"),
        (
            '{"query": "a", "positive": "b"}\n\n{"query": "a", "positive": " \\t"}\n',
            ":3 has a blank text in the field 'pos",
        ),
        ('{"query": "a", "positive": "b"}\n{"query": "a"}\n', ":2 has no text in the field 'positive'"),
        ('{"query": "a", "positive": null}\n', ":1 has no text in the field 'positive'"),
        ('{"query": "", "positive": "b"}\n', ":1 has a blank text in the field 'query'"),
        ('{"query": "a", "positive": "b"}\n{"query": "a", "positive": 3}\n', ":2 has a number in the field 'positive'"),
        ('{"query": "a", "positive": ["b", "c"]}\n', ":1 has a list in the field 'positive'"),
        ('{"query": "a", "positive": "b"}\n{"query": "a" "positive": "c"}\n', ":2 is not valid JSON"),
        ('{"query": "a", "answr": "b"}\n', "belongs to 'query' .fields: query, answr"),
        (
            '{"query": "a", "positive": "b", "negatives": ["x", "y"]}\n'
            '{"query": "a", "positive": "b", "negatives": ["x"]}\n',
            ":2 has 1 hard negative.* where the first pair has 2",
        ),
        ('{"query": "a", "positive": "b", "negatives": ["x", ""]}\n', ":1 has a blank text in the field 'negatives'"),
        (
            '{"query": "a", "positive": "b", "negative_1": "x", "negative_2": "y"}\n'
            '{"query": "a", "positive": "b", "negative_1": "x"}\n',
            ":2 has no text in the field 'negative_2'",
        ),
    ],
)
def test_bad_records_are_named(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=f"pairs.jsonl.*{message}"):
        read_pairs(path)


def test_a_fault_deep_in_a_large_file_is_found_at_once_and_named(tmp_path):
    rows = [{"query": f"q {i}", "positive": f"p {i}", "negative": "n"} for i in range(10_000)]
    rows[9_321]["positive"] = None
    first = write_jsonl(tmp_path / "data" / "a.jsonl", rows[:5_000])
    write_jsonl(tmp_path / "data" / "b.jsonl", rows[5_000:])
    with pytest.raises(UserError, match=r"b.jsonl:4322 has no text"):
        read_pairs(tmp_path / "data")
    kept = read_pairs(tmp_path / "data", bad_texts="keep")
    assert [b.index for b in kept.check_texts()] == [9_321]
    assert kept.name(4_999) == f"{first}:5000"


def test_numbers_of_negatives(tmp_path):
    pairs = read_pairs(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    assert pairs[2]["negatives"] == ["no 2", "nor"]
    many = [*text_rows(5_000), {**text_rows(1)[0], "negatives": ["one"]}]  # beyond the rows that are looked at together
    with pytest.raises(UserError, match=r"many.jsonl:5001 has 1 hard negative\(s\) where the first pair has 2"):
        read_pairs(write_jsonl(tmp_path / "many.jsonl", [*many, *text_rows(4_999)]))
    many[-1:] = [{**row, "negatives": ["one"]} for row in text_rows(4_096)]
    assert len(read_pairs(write_jsonl(tmp_path / "many.jsonl", many), bad_texts="keep").check_texts()) == 4_096
    single = [{"query": "q", "positive": "p", "negative": "n"}]
    assert read_pairs(write_jsonl(tmp_path / "b.jsonl", single))[0]["negatives"] == ["n"]


@pytest.mark.parametrize("ending", ["parquet", "tar", "jsonl.gz"])
def test_damaged_files(tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    path.write_bytes(b"PAR1 no such thing" * 20)
    with pytest.raises(UserError, match=f"pairs.{ending}"):
        read_pairs(path)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "nix.jsonl")
    with pytest.raises(UserError, match="No source"):
        read_pairs([])
    with pytest.raises(UserError, match="standard input"):
        read_pairs("-")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="plain text, not pairs"):
        read_pairs(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file of a known kind"):
        read_pairs(tmp_path / "empty")
    with pytest.raises(UserError, match="reading it as a hub data set failed"):
        read_pairs("nobody-here/no-data")
