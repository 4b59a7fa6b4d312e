import ast
import itertools
import math
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.worlds.domains import _WORDS, bigram_chain, domains, graded


def texts(rows):
    return [row["text"] for row in rows]


def bigrams(rows):
    """Counts bigrams of words and runs of punctuation, as DSIR sees them."""
    counts = Counter()
    for row in rows:
        tokens = re.findall(r"\w+|[^\w\s]+", row["text"])
        counts.update(itertools.pairwise(tokens))
    return counts


def divergence(a, b):
    """Jensen-Shannon divergence in bits."""
    total, total_a, total_b = 0.0, a.total(), b.total()
    for key in a.keys() | b.keys():
        p, q = a[key] / total_a, b[key] / total_b
        m = (p + q) / 2
        total += sum(x * math.log2(x / m) / 2 for x in (p, q) if x)
    return total


def test_fingerprints_never_change():
    assert domains(0).fingerprint() == "8a5a70a524cba08f7e8d36f30af82a06e3a53d849cc7a7be456ccdbc1e5c1923"
    assert (
        domains(1, pool_size=50, min_chars=10, max_chars=20).fingerprint()
        == "37714b720ad0e8d0a7d525b6e55a100b7b9e60a95b6ac7d169e2759af157ddd2"
    )
    assert graded(0).fingerprint() == "1c55cbb7de56b03f0cba016b962b23e67861b215b8b9f43f909866e17bcd9f13"


def test_default_counts():
    world = domains(3)
    assert world.counts == {
        "pool": {"rows": 800, "target": 120, "markov": 400, "javascript": 94, "english": 93, "logs": 93},
        "target": {"rows": 20, "target": 20},
        "heldout": {"rows": 100, "target": 100},
    }
    assert world.truth == {"target_kind": "target"}
    assert world.parameters["pool_size"] == 800


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    pool_size=st.integers(1, 40),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    low=st.integers(1, 200),
    width=st.integers(0, 100),
)
def test_sizes_lengths_and_shares_are_exact(seed, pool_size, shares, low, width):
    world = domains(
        seed, pool_size=pool_size, target_size=3, heldout_size=4, target_share=shares[0], markov_share=shares[1],
        min_chars=low, max_chars=low + width,
    )  # fmt: skip
    assert [len(rows) for rows in world.splits().values()] == [pool_size, 3, 4]
    assert all(low <= len(text) <= low + width for rows in world.splits().values() for text in texts(rows))
    kinds = Counter(row["kind"] for row in world.pool)
    assert kinds["target"] == round(pool_size * shares[0])
    assert kinds["markov"] in (round(pool_size * shares[1]), pool_size - kinds["target"])
    ordinary = [kinds[kind] for kind in ("javascript", "english", "logs")]
    assert max(ordinary) - min(ordinary) <= 1


def test_splits_share_no_function():
    world = domains(0, pool_size=2000, target_size=100, heldout_size=300)
    functions = {
        name: [unit for row in rows if row["kind"] == "target" for unit in row["text"].split("\n\n")[:-1]]
        for name, rows in world.splits().items()
    }
    everything = [unit for units in functions.values() for unit in units]
    assert len(everything) > 300
    assert len(set(everything)) == len(everything)


def test_no_function_is_written_twice_even_when_there_are_few(monkeypatch):
    def few_words(draw):
        return dict(zip("abcf", "pqrs"), k=draw.between(1, 40), m=0)

    monkeypatch.setitem(_WORDS, "target", few_words)
    world = domains(0, pool_size=10, target_size=20, heldout_size=20, target_share=1, markov_share=0, max_chars=600)
    units = [unit for rows in world.splits().values() for row in rows for unit in row["text"].split("\n\n")[:-1]]
    assert len(units) > 40
    assert len(set(units)) == len(units)


def test_lengths_do_not_tell_the_kind():
    world = domains(0, pool_size=3000)
    mean = {
        kind: sum(lengths) / len(lengths)
        for kind in ("target", "markov", "logs")
        if (lengths := [len(row["text"]) for row in world.pool if row["kind"] == kind])
    }
    assert all(abs(value - 300) < 20 for value in mean.values()), mean


def test_the_distractor_has_the_targets_bigrams_but_not_its_structure():
    world = domains(0, pool_size=3000, heldout_size=1000, target_share=0.25, markov_share=0.25)
    by_kind = {}
    for row in world.pool:
        by_kind.setdefault(row["kind"], []).append(row)
    reference = bigrams(world.heldout)
    far = {kind: divergence(bigrams(rows), reference) for kind, rows in by_kind.items()}
    # Two samples of the target itself differ too, since most pairs of names are rare.
    assert far["markov"] < 1.35 * far["target"]
    assert min(far["javascript"], far["english"], far["logs"]) > 4 * far["target"]

    def share_that_parses(rows):
        units = [unit for row in rows for unit in row["text"].split("\n\n")[:-1]]
        return sum(parses(unit) for unit in units) / len(units)

    assert share_that_parses(by_kind["target"]) == 1
    assert share_that_parses(by_kind["markov"]) < 0.05


def parses(source):
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def test_the_distractor_has_no_bigram_that_the_chain_has_not():
    chain = bigram_chain("def f(a):\n    return a\n\ndef g(b):\n    return f(b)")
    assert chain["\n\ndef"] == [" f", " g"]
    assert chain["\n    return"] == [" a", " f"]
    assert sorted(chain["("]) == ["a", "b", "b"]
    assert chain[")"] == ["\n\ndef"]  # the last token is followed by the first


def test_graded_levels_rise_evenly_from_none_to_all():
    world = graded(2, levels=5, level_size=40)
    assert world.truth["fractions"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for level, fraction in enumerate(world.truth["fractions"]):
        rows = world.level(level)
        assert len(rows) == 40
        assert sum(row["kind"] == "target" for row in rows) == 40 * fraction
    everything = texts([*world.levels, *world.target, *world.heldout])
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("make", [domains, graded])
def test_seeds_differ_and_repeat(make):
    assert make(4).fingerprint() == make(4).fingerprint() != make(5).fingerprint()
