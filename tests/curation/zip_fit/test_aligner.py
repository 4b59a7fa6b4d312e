import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.curation.selector import Selector, make_selector
from modelwright.curation.zip_fit import CompressionAligner, ZipFitSelector, alignment, dataset_alignment, ncd
from modelwright.errors import UserError
from modelwright.worlds.domains import domains

WORLD = domains(3, pool_size=60, target_size=8)
POOL = [row["text"] for row in WORLD.pool]
TARGET = [row["text"] for row in WORLD.target]
any_text = st.text(min_size=1, max_size=200)


def engines(name, level):
    pytest.importorskip("numba")
    return ["library", "compiled"] if (name, level) in {("zlib", 1), ("gzip", 1), ("lz4", 0)} else ["library"]


@pytest.mark.parametrize(
    ("name", "level"),
    [("zlib", 1), ("zlib", 6), ("zlib", 9), ("gzip", 1), ("lz4", 0), ("zstd", 1), ("brotli", 0), ("lzma", 0)],
)
def test_scores_equal_the_definition_exactly(name, level):
    expected = np.array([alignment(text, TARGET, name, level) for text in POOL])
    for engine in engines(name, level):
        scores = CompressionAligner(TARGET, name, level, engine=engine).score(POOL)
        np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("level", [1, 6, 9])
@settings(max_examples=30, deadline=None)
@given(sources=st.lists(any_text, min_size=1, max_size=4), targets=st.lists(any_text, min_size=1, max_size=4))
def test_scores_of_random_unicode_equal_the_definition_exactly(level, sources, targets):
    expected = [alignment(text, targets, "zlib", level) for text in sources]
    for engine in engines("zlib", level):
        assert CompressionAligner(targets, "zlib", level, engine=engine).score(sources).tolist() == expected


@pytest.mark.parametrize("engine", ["library", "compiled"])
def test_workers_do_not_change_a_bit(engine):
    if engine == "compiled":
        pytest.importorskip("numba")
    pool = POOL * 5
    aligner = CompressionAligner(TARGET, engine=engine)
    one = aligner.score(pool, num_proc=1)
    np.testing.assert_array_equal(one, aligner.score(pool, num_proc=2))
    np.testing.assert_array_equal(one[:60], one[-60:])
    np.testing.assert_array_equal(aligner.score(pool[7:9]), one[7:9])


def test_the_order_of_targets_does_not_matter_and_that_of_sources_goes_with_them():
    scores = CompressionAligner(TARGET).score(POOL)
    np.testing.assert_allclose(CompressionAligner(TARGET[::-1]).score(POOL), scores, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(CompressionAligner(TARGET).score(POOL[::-1]), scores[::-1])


def test_targets_given_twice_change_nothing():
    np.testing.assert_allclose(
        CompressionAligner(TARGET * 2).score(POOL), CompressionAligner(TARGET).score(POOL), rtol=0, atol=1e-12
    )


def test_a_copy_of_a_target_ranks_above_unrelated_documents_of_its_length():
    length = len(TARGET[0])
    others = [r["text"] for r in WORLD.pool if r["kind"] in ("english", "logs")]
    unrelated = [text[:length] for text in others if len(text) >= length]
    assert unrelated
    scores = CompressionAligner(TARGET).score([*unrelated, TARGET[0]])
    assert np.argmax(scores) == len(unrelated)


def test_empty_texts_have_no_score_and_are_counted():
    with pytest.warns(UserWarning, match="2 of 3 texts are empty"):
        scores = CompressionAligner(TARGET).score(["", POOL[0], ""])
    assert np.isnan(scores[[0, 2]]).all()
    assert scores[1] == alignment(POOL[0], TARGET)
    assert CompressionAligner(TARGET).score([]).shape == (0,)


def test_a_selector_leaves_counting_them_to_whoever_selects():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(ZipFitSelector().fit(TARGET).score(["", "x"])[0])


def test_bad_targets_and_rows_are_named():
    with pytest.raises(UserError, match="no targets"):
        CompressionAligner([])
    with pytest.raises(UserError, match="Target 1 is empty"):
        CompressionAligner(["a", ""])
    with pytest.raises(UserError, match="Row 2 is not text but NoneType"):
        CompressionAligner(["a"]).score(["a", "b", None])
    with pytest.raises(UserError, match="not a single str"):
        CompressionAligner("abc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0}, "use level 1"),
        ({"compressor": "gzip", "level": 0}, "use level 1"),
        ({"compressor": "rar"}, "no compressor 'rar'"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"chunk_bytes": -5}, "chunk_bytes must be at least 1"),
        ({"target_sample": 0}, "target_sample must be at least 1"),
        ({"approximate": "dictionary", "compressor": "lz4"}, "needs the compressor 'zlib'"),
        ({"engine": "compiled", "level": 9}, "no compiled kernel"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message):
    with pytest.raises(UserError, match=message):
        ZipFitSelector(**options)


def test_lone_surrogates_and_bytes_are_scored():
    odd = "abc\ud800def"
    assert CompressionAligner(TARGET).score([odd])[0] == alignment(odd.encode("utf-8", "surrogatepass"), TARGET)
    assert CompressionAligner([t.encode() for t in TARGET]).score([b"abc"])[0] == alignment("abc", TARGET)


def test_max_bytes_cuts_sources_and_targets():
    cut = CompressionAligner(TARGET, max_bytes=100).score(POOL)
    by_hand = CompressionAligner([t.encode()[:100] for t in TARGET]).score([t.encode()[:100] for t in POOL])
    np.testing.assert_array_equal(cut, by_hand)


def test_chunks_are_equal_parts_and_their_scores_are_averaged():
    text = POOL[0] + POOL[1]
    size = len(text.encode())
    aligner = CompressionAligner(TARGET, chunk_bytes=size // 2 - 1)  # three parts
    edges = [0, size // 3, size * 2 // 3, size]
    parts = [text.encode()[a:b] for a, b in itertools.pairwise(edges)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    plain = CompressionAligner(TARGET)
    assert aligner.score(["x", text, POOL[2][:20]])[1] == pytest.approx(plain.score(parts).mean(), abs=1e-15)
    assert aligner.score([POOL[2][:20]]) == plain.score([POOL[2][:20]])


def test_chunks_make_a_long_document_as_good_as_its_parts():
    # Ten good documents in one: too long for its targets, unless it is cut.
    good = [r["text"] for r in WORLD.pool if r["kind"] == "target"]
    long = "\n\n".join(good * 3)
    whole, cut = (CompressionAligner(TARGET, chunk_bytes=c).score([long])[0] for c in (None, 300))
    assert whole < 0.1 < cut


def test_subtracting_the_header_is_the_formula_on_smaller_sizes():
    def size(data):
        return len(zlib.compress(data, 1)) - len(zlib.compress(b"", 1))

    expected = [1 - np.mean([ncd(text, t, size) for t in TARGET]) for text in POOL]
    np.testing.assert_array_equal(CompressionAligner(TARGET, subtract_header=True).score(POOL), expected)


def test_a_sample_of_targets_depends_on_the_seed_alone():
    first, again, other = (CompressionAligner(TARGET, target_sample=3, seed=s) for s in (1, 1, 2))
    assert len(first.targets) == 3
    assert first.targets == again.targets != other.targets
    assert set(first.targets) <= {t.encode() for t in TARGET}
    assert CompressionAligner(TARGET, target_sample=100).targets == [t.encode() for t in TARGET]


def test_the_dictionary_approximation_prefers_the_target_domain_and_says_what_it_is():
    selector = ZipFitSelector(approximate="dictionary").fit(TARGET)
    scores = selector.score(POOL)
    kinds = np.array([r["kind"] for r in WORLD.pool])
    assert scores[kinds == "target"].mean() > scores[kinds == "english"].mean() + 0.1
    assert selector.details()["approximate"]
    assert np.isnan(selector.score([""])).all()


def test_dataset_alignment_is_the_mean_over_all_pairs():
    pairs = [1 - ncd(x, t) for x in POOL[:5] for t in TARGET]
    assert dataset_alignment(POOL[:5], TARGET) == pytest.approx(np.mean(pairs))
    with pytest.raises(UserError, match="not empty"):
        dataset_alignment([""], TARGET)


def test_it_is_a_selector_of_the_catalog():
    selector = make_selector("zip-fit", {"compressor": "lz4", "level": "0", "chunk-bytes": "2048"})
    assert selector == ZipFitSelector(compressor="lz4", level=0, chunk_bytes=2048)
    assert isinstance(selector, Selector)
    assert selector.fit(["abc"]).details()["version"]
    with pytest.raises(UserError, match="call fit"):
        ZipFitSelector().score(["x"])


def test_select_keeps_the_best_in_order_with_ties_by_index():
    datasets = pytest.importorskip("datasets")
    texts = [POOL[0], POOL[1], POOL[0], "", POOL[2]]
    selector = ZipFitSelector().fit(TARGET)
    picked = selector.select(datasets.Dataset.from_dict({"text": texts, "id": range(5)}), k=4)
    scores = CompressionAligner(TARGET).score([t or " " for t in texts])
    expected = sorted([0, 1, 2, 4], key=lambda i: (-scores[i], i))
    assert picked["id"] == expected
    assert picked["rank"] == [1, 2, 3, 4]
    assert selector.report.unscored == 1


SLEEPY = """
import os, sys, threading, time
from modelwright.curation.zip_fit import CompressionAligner
aligner = CompressionAligner(["target text " * 50] * 50, level=9, engine="library")
def ready():
    kids = []
    while len(kids) < 3:  # two workers and what tracks their resources; none may have had any work yet
        time.sleep(0.02)
        kids = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    time.sleep(float(sys.argv[1]))
    print(*kids, flush=True)
threading.Thread(target=ready, daemon=True).start()
aligner.score(["source text %d " % i * 200 for i in range(100_000)], num_proc=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for child processes in /proc")
@pytest.mark.parametrize(("how", "after"), [("SIGINT", 2.0), ("SIGKILL", 0.0), ("SIGKILL", 2.0)])
def test_no_worker_outlives_an_interrupted_run(how, after):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPY, str(after)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    children = process.stdout.readline().split()
    assert children
    os.kill(process.pid, getattr(signal, how))
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [c for c in children if Path(f"/proc/{c}").exists()] == []
