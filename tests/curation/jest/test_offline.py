"""Reference embeddings kept with the pairs, and choosing from a pool without training."""

import json

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset
from PIL import Image
from pyarrow import parquet

from modelwright.curation.jest import cache_reference_embeddings, offline
from modelwright.curation.jest import pool as pool_module
from modelwright.curation.jest.offline import choose_offline, select_offline
from modelwright.curation.jest.pool import PoolEmbeddings, embed_pool, model_fingerprint, read_metadata, super_batches
from modelwright.curation.jest.reference import cached_embeddings
from modelwright.curation.jest.sampler import JointSampler
from modelwright.curation.jest.scores import draw_from_scores, pairwise_sigmoid_nll
from modelwright.errors import UserError
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.training.contrastive.encoders import pair_encoder
from modelwright.training.contrastive.pairs import pairs_of, read_pairs
from modelwright.verbs import load_verb
from modelwright.verbs.select_jest import SelectJest

WORDS = ["red", "green", "blue", "cyan", "pink", "grey", "gold", "teal"]


class Noted:
    def __init__(self):
        self.done = {}
        self.label = ""

    def start(self, label, total=None):
        self.label = label
        self.done.setdefault(label, 0)

    def advance(self, units=1, note=""):
        self.done[self.label] += units

    def message(self, text):
        pass


def encoder(family="bert", seed=0):
    return pair_encoder(*tiny_pair(family, seed=seed), max_tokens=16).eval()


def write_texts(path, count=40):
    rows = [
        {
            "question": f"{WORDS[i % 8]} {i}",
            "answer": f"{WORDS[(i * 3) % 8]} {i}",
            "clean": i % 4 == 0,
            "kind": f"k{i % 2}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path):
    return read_pairs(write_texts(tmp_path / "pool.jsonl"))


def direct(encoder, pairs):
    with torch.no_grad():
        return encoder(encoder.collator(pairs.rows(range(len(pairs)))))


# The reference's embeddings


def test_cached_embeddings_are_the_models(tmp_path, texts):
    reference = encoder(seed=1)
    out = direct(reference, texts)
    for cached in (
        cache_reference_embeddings(texts, reference, output=tmp_path / "cached.parquet", batch_size=7),
        cache_reference_embeddings(texts, reference.model, reference.processor, batch_size=64),
    ):
        assert len(cached) == 40
        assert cached[5] == texts[5]
        assert cached.column("clean").tolist() == texts.column("clean").tolist()
        np.testing.assert_allclose(cached.column("ref_query_embeds"), out.queries, atol=1e-6)
        np.testing.assert_allclose(cached.column("ref_key_embeds"), out.keys, atol=1e-6)
        assert np.allclose(cached.column("ref_scale"), float(out.scale))
        assert np.isnan(cached.column("ref_bias")).all()
    about = read_metadata(tmp_path / "cached.parquet")["reference"]
    assert about["fingerprint"] == model_fingerprint(reference)
    assert about["width"] == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cached.parquet", "pool.jsonl"]


def test_a_part_of_the_pairs_in_memory_and_columns_that_are_there_already(texts):
    reference = encoder(seed=1)
    some = texts.select([7, 3, 30])
    cached = cache_reference_embeddings(some, reference)
    np.testing.assert_allclose(cached.column("ref_key_embeds"), direct(reference, some).keys, atol=1e-6)
    again = cache_reference_embeddings(cached, encoder(seed=2))
    np.testing.assert_allclose(again.column("ref_key_embeds"), direct(encoder(seed=2), some).keys, atol=1e-6)
    data = Dataset.from_dict({"query": ["a", "b"], "positive": ["c", "d"]})
    assert "ref_bias" in cache_reference_embeddings(data, reference).column_names


def test_the_fingerprint_sees_weights():
    assert model_fingerprint(encoder()) == model_fingerprint(encoder())
    assert model_fingerprint(encoder()) != model_fingerprint(encoder(seed=1))


@pytest.mark.parametrize("form", ["paths", "bytes"])
def test_pictures_are_found_from_the_new_file(tmp_path, form):
    source, target = tmp_path / "in" / "deep", tmp_path / "out"
    source.mkdir(parents=True)
    target.mkdir()
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 0, 255 - 40 * i)).save(source / f"{i}.png")
    if form == "paths":
        file = source / "pool.jsonl"
        file.write_text("".join(json.dumps({"image": f"{i}.png", "caption": f"no {i}"}) + "\n" for i in range(6)))
    else:
        file = source / "pool.parquet"
        images = [{"bytes": (source / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(6)]
        parquet.write_table(pyarrow.table({"image": images, "caption": [f"no {i}" for i in range(6)]}), file)
    pairs = read_pairs(file)
    model = encoder("siglip")
    cached = cache_reference_embeddings(pairs, model, output=target / "cached.parquet")
    assert cached[4]["query"].tobytes() == pairs[4]["query"].tobytes()
    assert cached.column("ref_bias")[0] == pytest.approx(model.bias().item())
    np.testing.assert_allclose(cached.column("ref_query_embeds"), direct(model, pairs).queries, atol=1e-5)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, texts, monkeypatch):
    reference, output = encoder(seed=1), tmp_path / "cached.parquet"
    monkeypatch.setattr(pool_module, "_NOTED_EVERY", -1.0)
    seen = []
    prepared = pool_module.prepared

    def stopping(pairs, collate, parts, workers):
        for i, part in enumerate(prepared(pairs, collate, parts, workers=workers)):
            seen.append(len(part["query_input_ids"]))
            if i == 3:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(pool_module, "prepared", stopping)
    with pytest.raises(KeyboardInterrupt):
        cache_reference_embeddings(texts, reference, output=output, batch_size=5)
    assert not output.exists()
    assert (tmp_path / "cached.parquet.embedding").is_dir()
    monkeypatch.setattr(pool_module, "prepared", prepared)
    progress = Noted()
    cached = cache_reference_embeddings(texts, reference, output=output, batch_size=5, progress=progress)
    assert progress.done == {"reference": 40, "write": 40}
    np.testing.assert_allclose(cached.column("ref_query_embeds"), direct(reference, texts).queries, atol=1e-6)
    assert not (tmp_path / "cached.parquet.embedding").exists()


def test_kept_embeddings_of_another_model_are_not_used(tmp_path, texts):
    folder = tmp_path / "kept"
    folder.mkdir()
    first = np.array(embed_pool(encoder(seed=1), texts, folder=folder, label="x").keys)
    second = embed_pool(encoder(seed=2), texts, folder=folder, label="x")
    assert not np.allclose(first, second.keys)
    np.testing.assert_allclose(second.keys, direct(encoder(seed=2), texts).keys, atol=1e-6)


# Choosing


def embeddings(count, seed, scale=5.0, bias=-2.0):
    rows = torch.randn(2, count, 8, generator=torch.Generator().manual_seed(seed))
    queries, keys = torch.nn.functional.normalize(rows, dim=-1).numpy()
    return PoolEmbeddings(queries, keys, scale, bias, "")


def test_super_batches_are_a_permutation():
    parts = list(super_batches(25, 10, 3))
    assert [len(p) for p in parts] == [10, 10, 5]
    assert sorted(np.concatenate(parts).tolist()) == list(range(25))
    assert not np.array_equal(parts[0], next(super_batches(25, 10, 4)))


def test_each_super_batch_gives_what_the_sampler_draws():
    learner, reference = embeddings(50, 0), embeddings(50, 1)
    sampler = JointSampler(n_chunks=2, filter_ratio=0.75)
    choice = choose_offline(learner, reference, 50, sampler, super_batch=20, seed=9)
    assert len(choice.rows) == 5 + 5 + 2
    assert choice.batches.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    rows = list(super_batches(50, 20, 9))[1]
    state = int(np.random.SeedSequence((9, 1)).generate_state(1, np.uint64)[0])
    scores = sum(
        sign * pairwise_sigmoid_nll(e.queries, e.keys, e.scale, e.bias).double()
        for sign, e in ((1, learner.rows(rows)), (-1, reference.rows(rows)))
    )
    draw = draw_from_scores(scores, 5, 2, torch.Generator().manual_seed(state >> 1))
    assert choice.rows[5:10].tolist() == rows[draw.indices.numpy()].tolist()
    assert choice.chunks[5:10].tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(choice.scores[5:10], draw.scores, rtol=1e-4, atol=1e-5)
    losses = torch.nn.functional.softplus(-(5.0 * torch.tensor(learner.queries * learner.keys).sum(1) - 2.0)).numpy()
    np.testing.assert_allclose(choice.losses["learner"], losses[choice.rows], rtol=1e-5)
    assert choice.learnability["chosen"] > choice.learnability["random"]


def test_the_pool_is_written_in_order_with_scores(tmp_path, texts):
    output = tmp_path / "chosen.parquet"
    result = select_offline(
        texts,
        output,
        JointSampler(n_chunks=2, filter_ratio=0.75),
        learner=encoder(),
        reference=encoder(seed=1),
        super_batch=20,
        group_field="kind",
        target_groups=["k0"],
    )
    rows = parquet.read_table(output).to_pylist()
    assert [row["jest_order"] for row in rows] == list(range(10))
    assert [row["jest_batch"] for row in rows] == [0] * 5 + [1] * 5
    assert [row["jest_chunk"] for row in rows] == [0, 0, 1, 1, 1] * 2
    assert len({row["question"] for row in rows}) == 10
    assert {"jest_score", "jest_learner_loss", "jest_reference_loss", "clean", "kind"} <= set(rows[0])
    assert result["pairs"] == 10
    assert result["form"] == "softmax"
    assert result["clean"]["pool"] == 0.25
    assert result["clean"]["chosen"] == sum(row["clean"] for row in rows) / 10
    assert result["groups"]["k0"] == {"pool": 20, "chosen": sum(row["kind"] == "k0" for row in rows)}
    assert result["precision"] == result["groups"]["k0"]["chosen"] / 10
    assert result["recall"] == result["groups"]["k0"]["chosen"] / 20
    assert len(read_pairs(output)) == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chosen.parquet", "pool.jsonl"]


def test_pairs_of_several_sources_keep_their_texts_and_scores(tmp_path):
    for name, shift in (("a", 0), ("b", 100)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"question": f"q {shift + i}", "answer": f"a {shift + i}"}) for i in range(30)]
        (tmp_path / name / "pool.jsonl").write_text("\n".join(lines))
    pairs = read_pairs([tmp_path / "a", tmp_path / "b"])
    order = np.random.default_rng(0).permutation(60)
    pairs = pairs.select(order)
    sampler = JointSampler(n_chunks=2, criterion="hard")
    select_offline(pairs, tmp_path / "chosen.parquet", sampler, learner=encoder(), super_batch=60)
    out = embed_pool(encoder(), pairs)
    losses = {pairs[i]["key"]: -20.0 * float(out.queries[i] @ out.keys[i]) for i in range(60)}
    rows = parquet.read_table(tmp_path / "chosen.parquet").to_pylist()
    assert {row["question"][2] == "1" and len(row["question"]) == 5 for row in rows} == {True, False}
    for row in rows:
        assert row["question"].split()[1] == row["answer"].split()[1]
        assert row["jest_learner_loss"] == pytest.approx(losses[row["answer"]], abs=1e-4)
    cached = cache_reference_embeddings(pairs, encoder(), output=tmp_path / "cached.parquet")
    assert [cached[i]["key"] for i in range(60)] == [pairs[i]["key"] for i in range(60)]
    in_memory = cache_reference_embeddings(pairs, encoder())
    np.testing.assert_allclose(in_memory.column("ref_key_embeds"), out.keys, atol=1e-6)
    np.testing.assert_allclose(cached.column("ref_key_embeds"), out.keys, atol=1e-6)


def test_a_good_reference_finds_the_clean_pairs(tmp_path):
    # Clean pairs have the same vector on both sides, in the reference's eyes; the others have unrelated ones.
    draw = np.random.default_rng(0)
    clean = draw.random(400) < 0.3
    queries = draw.standard_normal((400, 64)).astype(np.float32)
    keys = np.where(clean[:, None], queries, draw.standard_normal((400, 64))).astype(np.float32)
    unit = [list(rows / np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (queries, keys)]
    data = Dataset.from_dict(
        {
            "query": [f"q {i}" for i in range(400)],
            "positive": [f"p {i}" for i in range(400)],
            "clean": clean.tolist(),
            "ref_query_embeds": unit[0],
            "ref_key_embeds": unit[1],
            "ref_scale": [20.0] * 400,
            "ref_bias": [-10.0] * 400,
        }
    )
    pairs = pairs_of(data)
    shares = {}
    for criterion in ("easy_reference", "uniform"):
        result = select_offline(
            pairs, tmp_path / f"{criterion}.parquet", JointSampler(criterion=criterion), super_batch=200
        )
        shares[criterion] = result["clean"]["chosen"]
        assert result["clean"]["pool"] == pytest.approx(clean.mean())
    assert shares["easy_reference"] > 0.9
    assert shares["uniform"] < 0.5


# The verb


def test_the_verb_caches_then_chooses_by_the_cache(tmp_path):
    write_texts(tmp_path / "pool.jsonl")
    encoder().save(tmp_path / "learner")
    encoder(seed=1).save(tmp_path / "reference")
    common = {"super_batch": 20, "filter_ratio": 0.75, "n_chunks": 2, "model": str(tmp_path / "learner")}
    from modelwright.progress import Silent

    assert load_verb("select jest") is SelectJest
    with_model = SelectJest(
        pool=[str(tmp_path / "pool.jsonl")],
        output=tmp_path / "a.parquet",
        reference=str(tmp_path / "reference"),
        report=tmp_path / "report.json",
        device="cpu",
        **common,
    ).run(Silent())
    assert json.loads((tmp_path / "report.json").read_text())["pairs"] == with_model["pairs"] == 10
    made = SelectJest(
        pool=[str(tmp_path / "pool.jsonl")],
        output=tmp_path / "cached.parquet",
        reference=str(tmp_path / "reference"),
        cache_only=True,
        device="cpu",
    ).run(Silent())
    assert made["pairs"] == 40
    SelectJest(pool=[str(tmp_path / "cached.parquet")], output=tmp_path / "b.parquet", device="cpu", **common).run(
        Silent()
    )
    first, second = (parquet.read_table(tmp_path / f"{n}.parquet").to_pylist() for n in "ab")
    assert [row["question"] for row in first] == [row["question"] for row in second]
    with pytest.raises(UserError, match="exists already"):
        SelectJest(pool=[str(tmp_path / "pool.jsonl")], output=tmp_path / "a.parquet", **common).run(Silent())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "chosen.jsonl"}, "must end in .parquet"),
        ({"cache_only": True}, "give the model"),
        ({"filter_ratio": 1.0}, "filter_ratio"),
        ({"form": "softmax", "normalize": True}, "sigmoid form"),
        ({"super_batch": 0}, "super-batch"),
        ({"seed": -1}, "--seed"),
        ({"target_group": ["k0"]}, "needs group_field"),
        ({"group_field": "sort"}, "no column 'sort'"),
        ({"group_field": "kind", "target_group": ["k7"]}, "No pair is of the kind 'k7'"),
        ({}, "needs the learner"),
        ({"criterion": "easy_reference"}, "needs a reference"),
        ({"batch_size": 0, "criterion": "hard", "model": "LEARNER"}, "batch_size"),
        ({"criterion": "hard", "model": "PICTURES"}, "embeds image-text pairs and these are text-text"),
    ],
)
def test_the_verb_refuses_and_leaves_nothing(tmp_path, options, message):
    from modelwright.progress import Silent

    write_texts(tmp_path / "pool.jsonl")
    for name, family in (("LEARNER", "bert"), ("PICTURES", "clip")):
        if options.get("model") == name:
            encoder(family).save(tmp_path / name)
            options = {**options, "model": str(tmp_path / name)}
    before = sorted(p.name for p in tmp_path.iterdir())
    output = tmp_path / options.get("output", "chosen.parquet")
    verb = SelectJest(pool=[str(tmp_path / "pool.jsonl")], **{**options, "output": output, "device": "cpu"})
    with pytest.raises(UserError, match=message):
        verb.run(Silent())
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("sampler", "form", "message"),
    [({"normalize": True}, "auto", "sigmoid form"), ({}, None, "The learner has no bias")],
)
def test_a_form_that_does_not_suit_the_models_is_refused_before_they_are_run(
    tmp_path, texts, monkeypatch, sampler, form, message
):
    monkeypatch.setattr(offline, "embed_pool", lambda *args, **keys: pytest.fail("embedded"))
    with pytest.raises(UserError, match=message):
        select_offline(
            texts, tmp_path / "a.parquet", JointSampler(criterion="hard", **sampler), learner=encoder(), form=form
        )
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


def test_half_cached_and_mixed_references_are_refused(tmp_path, texts):
    cached = cache_reference_embeddings(texts, encoder(seed=1), output=tmp_path / "one.parquet")
    table = parquet.read_table(tmp_path / "one.parquet")
    parquet.write_table(table.drop_columns(["ref_bias"]), tmp_path / "half.parquet")
    with pytest.raises(UserError, match="not ref_bias"):
        cached_embeddings(read_pairs(tmp_path / "half.parquet"))
    scale = pyarrow.array(np.arange(40, dtype=np.float32))
    mixed = table.set_column(table.column_names.index("ref_scale"), "ref_scale", scale)
    parquet.write_table(mixed, tmp_path / "mixed.parquet")
    with pytest.raises(UserError, match="different references"):
        cached_embeddings(read_pairs(tmp_path / "mixed.parquet"))
    assert cached_embeddings(texts) is None
    assert cached_embeddings(cached).bias is None
