import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.probing.memorization.duplicates import BASE, count_duplicates, token_frequencies, window_hashes

ENGINES = ["numpy", "compiled"]


def brute_force(tokens, windows, boundaries=()):
    """Counts by comparing lists at every position."""
    tokens, length = tokens.tolist(), windows.shape[1]
    borders = set(np.asarray(boundaries).tolist())
    found = {}
    for i in range(len(tokens) - length + 1):
        if not borders.intersection(range(i + 1, i + length)):
            key = tuple(tokens[i : i + length])
            found[key] = found.get(key, 0) + 1
    return np.array([found.get(tuple(w), 0) for w in windows.tolist()])


@pytest.fixture(scope="module")
def corpus():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 4, 20_000)
    tokens[3000:3100] = 1  # overlapping occurrences
    tokens[9000:9064] = tokens[100:164]
    return tokens


def windows_of(tokens, length):
    starts = np.random.default_rng(1).integers(0, len(tokens) - length, 40)
    some = tokens[starts[:, None] + np.arange(length)]
    return np.concatenate([some, some[:3], np.full((1, length), 1), np.full((1, length), 9)])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 32])
def test_counts_are_those_of_brute_force(corpus, engine, length):
    windows = windows_of(corpus, length)
    assert count_duplicates(corpus, windows, engine=engine).tolist() == brute_force(corpus, windows).tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{"block": 977}, {"modulus": 3}, {"modulus": 1, "block": 5000}])
def test_blocks_and_collisions_change_nothing(corpus, engine, options):
    windows = windows_of(corpus, 6)
    assert count_duplicates(corpus, windows, engine=engine, **options).tolist() == brute_force(corpus, windows).tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", [101, 1 << 20])
def test_occurrences_over_a_border_do_not_count(corpus, engine, block):
    borders = np.array([0, 500, 3010, 3050, 9031, 9032, 19_999])
    windows = windows_of(corpus, 5)
    found = count_duplicates(corpus, windows, document_boundaries=borders, engine=engine, block=block)
    assert found.tolist() == brute_force(corpus, windows, borders).tolist()
    assert (found < count_duplicates(corpus, windows)).any()


def test_a_run_is_counted_at_every_place():
    assert count_duplicates(np.zeros(10, dtype=int), np.zeros((1, 4), dtype=int)).tolist() == [7]


def test_a_unique_sequence_has_one_and_an_absent_one_none():
    assert count_duplicates(np.arange(50), np.array([[3, 4, 5], [5, 4, 3]])).tolist() == [1, 0]
    assert count_duplicates(np.arange(2), np.array([[3, 4, 5]])).tolist() == [0]
    assert count_duplicates(np.arange(9), np.zeros((0, 3), dtype=int)).tolist() == []


def test_a_mapped_file_is_read_in_blocks_and_a_slice_of_it_is_a_slice(tmp_path, corpus):
    corpus.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    windows = windows_of(corpus, 4)
    assert count_duplicates(mapped, windows, block=999).tolist() == brute_force(corpus, windows).tolist()
    assert count_duplicates(mapped[77:5000], windows).tolist() == brute_force(corpus[77:5000], windows).tolist()


@pytest.mark.slow
def test_processes_share_the_blocks(tmp_path, corpus):
    corpus.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    windows = windows_of(corpus, 6)
    found = count_duplicates(mapped, windows, workers=2, block=3001, document_boundaries=[0, 5000])
    assert found.tolist() == brute_force(corpus, windows, [5000]).tolist()


@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 3))
def test_hashes_are_their_definition(length, count, seed):
    tokens = np.random.default_rng(seed).integers(0, 1 << 32, count)
    slow = [
        sum((int(t) + 1) * pow(BASE, length - 1 - j, 1 << 64) for j, t in enumerate(tokens[i : i + length])) % (1 << 64)
        for i in range(max(0, count - length + 1))
    ]
    assert window_hashes(tokens, length).tolist() == slow


def test_frequencies_are_counts(corpus):
    assert token_frequencies(corpus, 6, block=999).tolist() == [*np.bincount(corpus).tolist(), 0, 0]
    with pytest.raises(UserError, match="another tokenizer"):
        token_frequencies(corpus, 3)


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        (np.zeros(3, dtype=int), {}, "table of token ids"),
        (np.zeros((1, 3)), {}, "table of token ids"),
        (np.full((1, 3), -1), {}, "table of token ids"),
        (np.zeros((1, 3), dtype=int), {"workers": 0}, "at least 1"),
        (np.zeros((1, 3), dtype=int), {"engine": "magic"}, "use auto"),
    ],
)
def test_bad_input_is_a_sentence(windows, options, message):
    with pytest.raises(UserError, match=message):
        count_duplicates(np.arange(9), windows, **options)
    with pytest.raises(UserError, match="row of token ids"):
        count_duplicates(np.zeros((3, 3), dtype=int), np.zeros((1, 2), dtype=int))
