import gzip
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.curation.zip_fit import alignment, make_compressor, ncd
from modelwright.curation.zip_fit.compressors import NAMES, check_level
from modelwright.errors import UserError


def distinct(data: bytes) -> int:
    return len(set(data))


def test_ncd_of_sizes_known_by_hand():
    # C("abc") = 3, C("cde") = 3, C("abccde") = 5: (5 - 3) / 3
    assert ncd("abc", "cde", distinct) == pytest.approx(2 / 3)
    # C("a") = 1, C("abcd") = 4, C("aabcd") = 4: (4 - 1) / 4
    assert ncd("a", "abcd", distinct) == pytest.approx(3 / 4)
    assert ncd("aaa", "a", distinct) == 0


def test_the_source_comes_first():
    seen = []

    def size(data):
        seen.append(data)
        return len(data)

    ncd("source", "target", size)
    assert b"sourcetarget" in seen
    assert b"targetsource" not in seen


def test_alignment_is_one_minus_the_mean_distance_and_the_mean_of_one_minus_the_distances():
    targets = ["abc", "bcd", "xyz"]
    distances = [ncd("abd", t, distinct) for t in targets]
    assert alignment("abd", targets, distinct) == pytest.approx(1 - np.mean(distances))
    assert alignment("abd", targets, distinct) == pytest.approx(np.mean([1 - d for d in distances]))


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_ncd_is_the_formula_on_zlib_sizes(a, b):
    a, b = a.encode("utf-8", "surrogatepass"), b.encode("utf-8", "surrogatepass")
    x, y, xy = (len(zlib.compress(data, 1)) for data in (a, b, a + b))
    assert ncd(a, b) == (xy - min(x, y)) / max(x, y)


def test_the_window_limits_what_a_text_is_like():
    random = np.random.default_rng(0)
    short, long = random.integers(32, 127, 300, dtype=np.uint8).tobytes(), random.bytes(40_000)
    assert ncd(short, short) == pytest.approx(0.037, abs=0.03)
    assert ncd(long, long) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_every_compressor_compresses_and_says_its_version(name):
    compressor = make_compressor(name)
    assert compressor.size(b"abc" * 1000) < 300
    assert compressor.empty == compressor.size(b"")
    assert compressor.version
    assert make_compressor(name, "fastest").level == compressor.level


def test_gzip_is_what_gzip_writes():
    data = b"def f(x):\n    return x\n" * 5
    assert make_compressor("gzip", 6).size(data) == len(gzip.compress(data, 6))


@pytest.mark.parametrize("name", ["zlib", "gzip"])
def test_level_zero_is_refused(name):
    with pytest.raises(UserError, match="stores without compressing.*use level 1"):
        check_level(name, 0)
    assert check_level(name, "fastest") == 1
    assert check_level("lz4", 0) == 0


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("zlib", 10, "no level 10: give one from 1 to 9"),
        ("gzip", -1, "no level -1"),
        ("zlib", "high", "whole number or 'fastest'"),
        ("zlib", True, "whole number"),
        ("zlob", 1, "did you mean 'zlib'"),
    ],
)
def test_wrong_compressors_and_levels_are_refused(name, level, message):
    with pytest.raises(UserError, match=message):
        make_compressor(name, level)


@pytest.mark.parametrize(("name", "module"), [("lz4", "lz4.frame"), ("zstd", "zstandard"), ("brotli", "brotli")])
def test_a_missing_package_is_named(name, module, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'modelwright\[compressors\]'"):
        make_compressor(name)


def test_empty_texts_are_refused_by_the_definition():
    with pytest.raises(UserError, match="at least one target"):
        alignment("x", [])
    with pytest.raises(UserError, match="none of them empty"):
        alignment("x", ["a", ""])
    with pytest.raises(UserError, match="not defined"):
        ncd("", "", distinct)
