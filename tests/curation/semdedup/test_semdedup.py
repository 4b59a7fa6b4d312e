"""SemDeDup and D4 against the definitions, and the embeddings of every kind of encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from modelwright.curation import semdedup
from modelwright.curation.semdedup import D4Selector, SemDedupSelector, duplicate_distance, prototype_distance
from modelwright.curation.semdedup.embed import embed_all, load_embedder
from modelwright.errors import UserError
from modelwright.models.loading import load_model, load_tokenizer, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model

TEXTS = ["the cat sat", "a much longer document about something else entirely", "x", "the cat sat"]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    save_model(tiny_model("llama"), byte_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"  # BERT's positions are absolute
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def slow_duplicate_distance(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Algorithm 1 in float64, one pair at a time."""
    rows = vectors.astype(np.float64)
    distances = np.full(len(rows), 2.0)
    for label in set(labels):
        members = [i for i in range(len(rows)) if labels[i] == label]
        centre = rows[members].mean(axis=0)
        centre /= np.linalg.norm(centre) or 1
        ordered = sorted(members, key=lambda i: (round(float(rows[i] @ centre), 6), i))
        for place, i in enumerate(ordered):
            for j in ordered[:place]:
                distances[i] = min(distances[i], 1 - rows[i] @ rows[j])
    return distances


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9))
def test_duplicate_distance_is_that_of_the_definition(seed: int, count: int, clusters: int, block: int) -> None:
    generator = np.random.default_rng(seed)
    vectors = unit(generator.normal(size=(count, 3)))
    labels = generator.integers(0, clusters, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semdedup, "_BLOCK", block)
        found = duplicate_distance(vectors, labels)
    np.testing.assert_allclose(found, slow_duplicate_distance(vectors, labels), atol=1e-5)


def test_prototype_distance_is_that_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    vectors, labels = unit(generator.normal(size=(30, 4))), generator.integers(0, 3, 30)
    found = prototype_distance(vectors, labels)
    for label in range(3):
        rows = vectors[labels == label].astype(np.float64)
        centre = rows.mean(axis=0)
        np.testing.assert_allclose(found[labels == label], 1 - rows @ centre / np.linalg.norm(centre), atol=1e-5)


def test_of_each_group_of_copies_the_one_farthest_from_the_centre_is_kept() -> None:
    # Two near duplicates beside a crowd: the centroid lies in the crowd, and the farther of the two stays.
    vectors = unit(np.array([[1, 0.02], [1, 0.0], [0.1, 1], [0.0, 1], [-0.1, 1]]))
    distances = duplicate_distance(vectors, np.zeros(5, dtype=int))
    assert distances[1] == 2.0
    assert distances[0] < 0.001
    # Of equal documents, the first in the pool.
    same = duplicate_distance(unit(np.ones((3, 4))), np.zeros(3, dtype=int))
    assert same[0] == 2.0
    np.testing.assert_allclose(same[1:], 0, atol=1e-6)


def test_a_causal_lm_embeds_by_its_last_token_whatever_the_batch(llama: Path) -> None:
    embed = load_embedder(str(llama), batch_size=3)
    vectors = embed(TEXTS)
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    for text, vector in zip(TEXTS, vectors):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -1].detach().numpy()
        np.testing.assert_allclose(vector, hidden / np.linalg.norm(hidden), atol=1e-5)
    assert vectors.dtype == np.float32


def test_an_encoder_embeds_by_the_mean_over_its_tokens(bert: Path) -> None:
    vectors = load_embedder(str(bert), batch_size=3)(TEXTS)
    model, tokenizer = BertModel.from_pretrained(bert).eval(), load_tokenizer(bert)
    for text, vector in zip(TEXTS, vectors):
        hidden = model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0].mean(0).detach().numpy()
        np.testing.assert_allclose(vector, hidden / np.linalg.norm(hidden), atol=1e-5)
    # Asked for, the last token's is taken there too.
    assert not np.allclose(load_embedder(str(bert), pooling="last")(TEXTS), vectors, atol=1e-3)


def test_a_sentence_transformers_folder_pools_as_it_says(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(bert)).save(str(tmp_path / "st"))  # it adds mean pooling to a plain encoder
    assert (tmp_path / "st" / "modules.json").is_file()
    np.testing.assert_allclose(load_embedder(str(tmp_path / "st"))(TEXTS), load_embedder(str(bert))(TEXTS), atol=1e-5)


def test_long_texts_are_cut(llama: Path) -> None:
    embed = load_embedder(str(llama), max_tokens=5)
    np.testing.assert_allclose(embed(["abcde and more"]), embed(["abcde and less"]), atol=1e-6)


def test_blank_texts_are_left_out() -> None:
    vectors, positions, count = embed_all(lambda texts: np.ones((len(texts), 2), np.float32), ["", "a", " ", "b"])
    assert (vectors.shape, positions.tolist(), count) == ((2, 2), [1, 3], 4)


def test_semdedup_drops_copies_and_top_chooses_epsilon(llama: Path) -> None:
    texts = [f"document number {i} " * (i % 4 + 1) for i in range(20)]
    pool = Dataset.from_dict({"text": [*texts, *texts[:5], ""]})
    # One cluster, so that copies cannot be parted.
    selector = SemDedupSelector(encoder=str(llama), clusters=1, epsilon=1e-5).fit([])
    scores = selector.score_pool(pool["text"])
    assert np.isnan(scores[[20, 21, 22, 23, 24, 25]]).all()
    assert not np.isnan(scores[:20]).any()
    assert sorted(selector.select(pool)["text"]) == sorted(texts)
    # A larger epsilon keeps the documents that a smaller number of documents keeps.
    for k in (3, 9):
        chosen = selector.select(pool, k=k)
        epsilon = chosen["score"][-1]
        again = SemDedupSelector(encoder=str(llama), clusters=1, epsilon=epsilon).fit([]).select(pool)
        assert again["text"] == chosen["text"]


def test_d4_drops_duplicates_then_prefers_what_is_far_from_the_centre(llama: Path) -> None:
    texts = [f"document number {i} " * (i % 4 + 1) for i in range(15)]
    pool = [*texts, *texts[:5]]
    selector = D4Selector(encoder=str(llama), clusters=1, dedup_fraction=0.75).fit([])
    scores = selector.score_pool(pool)
    assert np.isnan(scores[15:]).all()
    vectors = load_embedder(str(llama))(texts)
    np.testing.assert_allclose(scores[:15], prototype_distance(vectors, np.zeros(15, dtype=int)), atol=1e-5)


def test_the_same_seed_gives_the_same_scores(llama: Path) -> None:
    texts = [f"document number {i} " * (i % 4 + 1) for i in range(60)]
    one, two = (D4Selector(encoder=str(llama), seed=3).fit([]).score_pool(texts) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_mistakes(llama: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="An encoder is needed"):
        SemDedupSelector().fit([])
    with pytest.raises(UserError, match="does not exist"):
        D4Selector(encoder=str(tmp_path / "nowhere")).fit([])
    with pytest.raises(UserError, match="epsilon is 1 - cosine"):
        SemDedupSelector(encoder="x", epsilon=-0.1)
    with pytest.raises(UserError, match="dedup_fraction must be above 0"):
        D4Selector(encoder="x", dedup_fraction=0)
    with pytest.raises(UserError, match="clusters must be at least 1"):
        D4Selector(encoder="x", clusters=0)
    with pytest.raises(UserError, match="pooling must be"):
        D4Selector(encoder="x", pooling="first")
    with pytest.raises(UserError, match="not said how much to keep"):
        D4Selector(encoder=str(llama)).select(Dataset.from_dict({"text": TEXTS}))


def test_incomplete_weights_are_refused(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 1 tensors of the model, such as encoder.layer.1.output.dense.weight"):
        load_embedder(str(folder))
    raw = (bert / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="could not be loaded as an encoder"):
        load_embedder(str(folder))
