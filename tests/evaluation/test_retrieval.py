"""Retrieval by tiles against a dense reference; what a tie and a duplicate count; the verb on three kinds of models."""

import json

import datasets
import pytest
import torch
from PIL import Image

from modelwright.errors import UserError
from modelwright.evaluation.retrieval import evaluate_retrieval, paired_metrics, retrieval_metrics
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.progress import Silent
from modelwright.training.contrastive.encoders import pair_encoder
from modelwright.training.contrastive.pairs import read_pairs
from modelwright.verbs import load_verb


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def dense(queries, keys, right, ks=(1, 5, 10)):
    """One row at a time, by sorting, from a full matrix: (m, n) truths ``right``."""
    found = {}
    for name, scores, truths in (
        ("query_to_key", queries @ keys.T, right),
        ("key_to_query", (queries @ keys.T).T, right.T),
    ):
        ranks = []
        for row, truth in zip(scores.tolist(), truths.tolist()):
            if any(truth):
                # Wrong answers first among equals.
                order = sorted(range(len(row)), key=lambda j: (-row[j], truth[j]))
                first = next(p for p, j in enumerate(order) if truth[j])
                ranks.append(1 + sum(not truth[j] for j in order[:first]))
        for k in ks:
            found[f"{name}_recall@{k}"] = sum(r <= k for r in ranks) / len(ranks)
        found[f"{name}_mrr"] = sum(1 / r for r in ranks) / len(ranks)
        ordered = sorted(ranks)
        found[f"{name}_median_rank"] = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
    for k in ks:
        found[f"mean_recall@{k}"] = (found[f"query_to_key_recall@{k}"] + found[f"key_to_query_recall@{k}"]) / 2
    return found


def embeddings(m, n, d=6, seed=0, whole=False):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: many ties, and every order of summation gives exactly the same.
    if whole:
        return (torch.randint(-2, 3, (rows, d), generator=generator).double() for rows in (m, n))
    queries = torch.randn(m, d, generator=generator, dtype=torch.float64)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
    keys[: min(m, n)] += queries[: min(m, n)]
    return queries, keys


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (37, 37), (23, 40)])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_equals_the_dense_reference(m, n, block, whole):
    queries, keys = embeddings(m, n, whole=whole)
    expected = dense(queries, keys, torch.eye(m, n, dtype=torch.bool))
    assert retrieval_metrics(queries, keys, block_size=block) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("whole", [False, True])
def test_labels_groups_and_several_right_keys(block, whole):
    queries, keys = embeddings(20, 30, whole=whole)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 30, (20,), generator=generator)
    right = torch.zeros(20, 30, dtype=torch.bool)
    right[torch.arange(20), labels] = True
    found = retrieval_metrics(queries, keys, labels=labels, block_size=block)
    assert found == pytest.approx(dense(queries, keys, right), abs=1e-12)
    groups = torch.randint(0, 9, (30,), generator=generator)
    found = retrieval_metrics(queries, keys, labels=labels, groups=groups, block_size=block)
    assert found == pytest.approx(dense(queries, keys, groups[labels][:, None] == groups[None]), abs=1e-12)
    right |= torch.rand(20, 30, generator=generator) < 0.1
    found = retrieval_metrics(queries, keys, labels=right.nonzero().flip(0), block_size=block)
    assert found == pytest.approx(dense(queries, keys, right), abs=1e-12)


def test_a_model_that_gives_everything_one_embedding_is_last():
    same = torch.ones(50, 4)
    found = retrieval_metrics(same, same)
    assert found["query_to_key_recall@10"] == found["key_to_query_recall@10"] == 0
    assert found["query_to_key_median_rank"] == 50
    assert retrieval_metrics(torch.eye(50), torch.eye(50))["mean_recall@1"] == 1


def test_duplicates_are_not_held_against_a_perfect_model():
    """Five captions of one image, a caption of two images, a pair that stands twice."""
    pairs = [("i1", "a"), ("i1", "b"), ("i1", "c"), ("i2", "d"), ("i3", "d"), ("i4", "e"), ("i4", "e")]
    names = {"i1": 0, "i2": 1, "i3": 1, "i4": 2, "a": 0, "b": 0, "c": 0, "d": 1, "e": 2}
    space = torch.eye(3)
    queries = torch.stack([space[names[q]] for q, _ in pairs])
    keys = torch.stack([space[names[k]] for _, k in pairs])
    found = paired_metrics(queries, keys, pairs)
    assert (found["queries"], found["keys"], found["pairs"]) == (4, 5, 7)
    assert found["mean_recall@1"] == 1
    assert retrieval_metrics(queries, keys)["mean_recall@1"] < 1
    # One embedding for all is no better for it.
    assert paired_metrics(torch.ones(7, 3), torch.ones(7, 3), pairs)["mean_recall@1"] == 0


def test_no_tensor_of_all_scores(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple | list) else (found,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return found

    queries, keys = embeddings(600, 600)
    with Watch():
        retrieval_metrics(queries, keys, block_size=50)
        retrieval_metrics(queries, keys, labels=torch.arange(600).repeat(2, 1).T, block_size=50)
    assert 50 * 50 <= largest <= 600 * 6


def test_half_precision_is_ranked_in_float32():
    queries, keys = (t.bfloat16() for t in embeddings(30, 30))
    assert retrieval_metrics(queries, keys) == retrieval_metrics(queries.float(), keys.float())


@pytest.mark.parametrize(
    ("queries", "keys", "options", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), {}, "same width"),
        (torch.ones(3), torch.ones(3), {}, "matrices"),
        (torch.ones(0, 2), torch.ones(0, 2), {}, "no queries"),
        (torch.ones(3, 2).long(), torch.ones(3, 2).long(), {}, "floating point"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), {}, "not finite"),
        (torch.ones(3, 2), torch.ones(2, 2), {}, "3 queries and 2 keys"),
        (torch.ones(3, 2), torch.ones(3, 2), {"labels": torch.tensor([0, 1, 3])}, "from 0 to 3"),
        (torch.ones(3, 2), torch.ones(3, 2), {"labels": torch.tensor([0, 1])}, "do not fit"),
        (torch.ones(3, 2), torch.ones(3, 2), {"labels": torch.ones(3)}, "integers"),
        (torch.ones(3, 2), torch.ones(3, 2), {"labels": torch.tensor([[0, 0], [2, 2]])}, "Query 1 has no right key"),
        (torch.ones(3, 2), torch.ones(3, 2), {"labels": torch.tensor([[5, 0]])}, "beyond the 3"),
        (torch.ones(3, 2), torch.ones(3, 2), {"groups": torch.zeros(2, dtype=torch.int64)}, "Groups"),
        (torch.ones(3, 2), torch.ones(3, 2), {"ks": (0,)}, "every k"),
        (torch.ones(3, 2), torch.ones(3, 2), {"block_size": 0}, "block size"),
    ],
)
def test_faults(queries, keys, options, message):
    with pytest.raises(UserError, match=message):
        retrieval_metrics(queries, keys, **options)


# Whole models


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(9):
        Image.effect_noise((20, 20), 20 * (number + 1)).convert("RGB").save(folder / f"{number}.png")
        lines += [json.dumps({"image": f"{number}.png", "text": f"picture {number}, {words}"}) for words in ("a", "b")]
    (folder / "images.jsonl").write_text("\n".join(lines))
    rows = [{"query": f"question {i}", "positive": f"{i} is the answer", "negative": "no"} for i in range(11)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for family in ("clip", "siglip", "bert"):
        pair_encoder(*tiny_pair(family)).save(folder / family)
    return folder


@pytest.mark.parametrize("family", ["clip", "siglip", "bert"])
def test_mini_batches_and_the_verb_give_what_one_batch_gives(data, tmp_path, family):
    source = data / ("texts.jsonl" if family == "bert" else "images.jsonl")
    pairs = read_pairs(source)
    encoder = pair_encoder(*tiny_pair(family)).train()
    batch = encoder.collator(pairs.rows(range(len(pairs))))
    with torch.no_grad():
        encoded = encoder.eval()(batch)
    expected = paired_metrics(encoded.queries, encoded.keys, pairs.identities())
    encoder.train()
    state = torch.get_rng_state()
    assert evaluate_retrieval(encoder, pairs, batch_size=4) == pytest.approx(expected)
    assert encoder.training
    assert torch.equal(torch.get_rng_state(), state)
    output = tmp_path / "out.json"
    verb = load_verb("evaluate retrieval")
    found = verb(model=str(data / family), data=[str(source)], output=output, device="cpu", batch_size=5).run(Silent())
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert found["queries"] == (11 if family == "bert" else 9)
    written = json.loads(output.read_text())
    assert written["results"]["retrieval"]["mean_recall@1,none"] == found["mean_recall@1"]
    assert written["higher_is_better"]["retrieval"]["query_to_key_median_rank"] is False
    assert written["counts"] == {
        "pairs": len(pairs),
        "queries": found["queries"],
        "keys": found["keys"],
        "skipped": 0,
    }
    assert written["config"]["model_args"]["architecture"] == type(encoder.model).__name__


def test_verb_skips_bad_pairs_on_request_and_counts_them(data, tmp_path):
    lines = (data / "images.jsonl").read_text().splitlines()
    (data / "bad.jsonl").write_text("\n".join([*lines, '{"image": "nix.png", "text": "gone"}']))
    verb = load_verb("evaluate retrieval")
    options = {"model": str(data / "clip"), "data": [str(data / "bad.jsonl")], "device": "cpu"}
    with pytest.raises(UserError, match=r"bad.jsonl:19 has an image \(nix.png\) that does not exist"):
        verb(**options, output=tmp_path / "a.json").run(Silent())
    assert not (tmp_path / "a.json").exists()
    found = verb(**options, output=tmp_path / "a.json", skip_bad=True).run(Silent())
    assert (found["pairs"], found["skipped"]) == (18, 1)
    found = verb(**options, output=tmp_path / "b.json", limit=4, ks="2").run(Silent())
    assert (found["pairs"], found["queries"]) == (4, 2)
    assert {k for k in found if "recall" in k} == {
        "query_to_key_recall@2",
        "key_to_query_recall@2",
        "mean_recall@2",
    }


def test_verb_faults(data, tmp_path):
    verb = load_verb("evaluate retrieval")
    options = {"model": str(data / "clip"), "data": [str(data / "images.jsonl")], "device": "cpu"}
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(UserError, match="--force"):
        verb(**options, output=tmp_path / "there.json").run(Silent())
    with pytest.raises(UserError, match="image-text pairs, but the data are text-text"):
        verb(**{**options, "data": [str(data / "texts.jsonl")]}, output=tmp_path / "a.json").run(Silent())
    for option in ({"batch_size": 0}, {"limit": 0}, {"ks": "0,1"}):
        with pytest.raises(UserError, match="at least 1"):
            verb(**options, **option, output=tmp_path / "a.json").run(Silent())
    with pytest.raises(UserError, match="numbers with commas"):
        verb(**options, ks="1;5", output=tmp_path / "a.json").run(Silent())
    assert not (tmp_path / "a.json").exists()


def test_a_model_whose_weights_are_not_finite_is_refused(data):
    encoder = pair_encoder(*tiny_pair("clip"))
    encoder.model.visual_projection.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate_retrieval(encoder, read_pairs(data / "images.jsonl"))
