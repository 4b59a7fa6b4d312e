"""The compiled kernels and the library's faster paths against the library, byte for byte."""

import random
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.curation.zip_fit import pair_sizes
from modelwright.curation.zip_fit.compressors import make_compressor
from modelwright.curation.zip_fit.pair_sizes import PairSizes, library_sizes
from modelwright.errors import UserError

COMPILED = [("zlib", 1), ("zlib", 2), ("zlib", 3), ("gzip", 1), ("lz4", 0), ("lz4", 1), ("lz4", -4)]
LIBRARY = [("zlib", 6), ("zlib", 9), ("gzip", 9), ("lz4", 3), ("zstd", 1), ("brotli", 0), ("lzma", 0)]


def plain(compressor, targets, sources):
    """The definition: every concatenation is compressed anew."""
    return np.array([[compressor.size(x)] + [compressor.size(x + t) for t in targets] for x in sources])


def check(name, level, targets, sources, engine):
    compressor = make_compressor(name, level)
    sizes = PairSizes(compressor, targets, engine)
    with warnings.catch_warnings():
        # The kernel gives way to the library where the two differ: here that would hide the difference.
        warnings.simplefilter("error")
        table = sizes(sources)
    assert sizes.plan(0) == (engine == "compiled")
    np.testing.assert_array_equal(table, plain(compressor, targets, sources))


pieces = st.one_of(
    st.text(max_size=60),
    st.text("ab \n", max_size=60),
    st.sampled_from(["def f(x):\n    return x\n", "the cat sat on the mat. ", "0" * 300, "émigré ☃ ", "\0" * 40]),
)
texts = st.lists(pieces, min_size=1, max_size=8).map(lambda p: "".join(p).encode("utf-8", "surrogatepass"))
nonempty = texts.filter(len)


@pytest.mark.parametrize(("name", "level"), COMPILED)
@settings(max_examples=60, deadline=None)
@given(sources=st.lists(nonempty, min_size=1, max_size=4), targets=st.lists(nonempty, min_size=1, max_size=4))
def test_the_kernel_gives_the_librarys_sizes(name, level, sources, targets):
    pytest.importorskip("numba")
    check(name, level, targets, sources, "compiled")


@pytest.mark.parametrize(("name", "level"), LIBRARY)
@settings(max_examples=20, deadline=None)
@given(sources=st.lists(nonempty, min_size=1, max_size=3), targets=st.lists(nonempty, min_size=1, max_size=3))
def test_the_library_path_gives_the_plain_sizes(name, level, sources, targets):
    check(name, level, targets, sources, "library")


def mixed(seed, size):
    """Bytes that are partly random, partly repeated at short and long distances."""
    draw = random.Random(seed)
    out = bytearray(draw.randbytes(draw.randrange(1, 40)))
    while len(out) < size:
        kind = draw.randrange(4)
        if kind == 0:
            out += draw.randbytes(draw.randrange(1, 60))
        elif kind == 1:
            out += bytes([draw.choice(b"abcdefgh ")]) * draw.randrange(1, 400)
        elif kind == 2:
            out += bytes(draw.choices(b"etaoin shrdlu", k=draw.randrange(1, 80)))
        else:
            start = draw.randrange(len(out))
            out += out[start : start + draw.randrange(1, 400)]
    return bytes(out[:size])


SIZES = [1, 2, 3, 4, 5, 11, 12, 13, 14, 20, 100, 257, 258, 259, 262, 263, 1000, 5000]


@pytest.mark.parametrize(("name", "level"), COMPILED)
def test_the_kernel_at_every_kind_of_length(name, level):
    pytest.importorskip("numba")
    sources = [mixed(100 * size + i, size) for size in SIZES for i in range(3)]
    targets = [mixed(i, size) for i, size in enumerate([1, 2, 3, 7, 12, 13, 40, 258, 300, 2000])]
    check(name, level, targets, sources, "compiled")


@pytest.mark.parametrize(("name", "level"), COMPILED)
def test_incompressible_and_constant_bytes(name, level):
    pytest.importorskip("numba")
    draw = random.Random(0)
    sources = [draw.randbytes(n) for n in (5, 30, 300, 3000)] + [b"a" * n for n in (5, 30, 300, 3000)]
    check(name, level, [*sources[:3], b"a" * 50], sources, "compiled")


def test_trees_deeper_than_a_code_may_be_are_shortened_as_zlib_does():
    pytest.importorskip("numba")
    from modelwright.curation.zip_fit import deflate_kernel as kernel

    draw = random.Random(0)
    for _ in range(200):
        # Counts that grow like Fibonacci numbers give the deepest Huffman tree: beyond 15 bits from 17 symbols on.
        counts = [1, draw.randrange(1, 3)]
        while sum(counts) + counts[-1] + counts[-2] < 15_000:
            counts.append(counts[-1] + counts[-2] + draw.randrange(2))
        data = b"".join(bytes([symbol]) * n for symbol, n in zip(draw.sample(range(256), len(counts)), counts))
        stream = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)  # literals alone: the counts decide the size
        expected = len(stream.compress(data) + stream.flush())
        scratch = [np.zeros(kernel._HEAP_SIZE + 2, dtype=np.int64) for _ in range(9)]
        scratch[0][:256] = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
        scratch[0][256] = 1
        assert kernel._block_bytes(len(data), *scratch) + 6 == expected


def test_places_within_a_match_near_the_end_of_the_source_are_found():
    pytest.importorskip("numba")
    # "abc" is matched with one or two bytes of the source left, so whether zlib stores "bcZ" depends on what follows.
    for end in (b"Z", b"ZY"):
        source = b"abcQ 0123456789 abc" + end
        target = b"uvwxyz!?=+ bc" + end + b"uvwxyz!?=+ " + b"bc" + end + b"uvw"
        for level in (1, 2, 3):
            check("zlib", level, [target, target[:9], b"x"], [source], "compiled")


@pytest.mark.parametrize(("name", "level"), [("zlib", 1), ("lz4", 0)])
def test_long_documents_fall_back_to_the_library(name, level):
    pytest.importorskip("numba")
    # Around the kernels' own limits, a block's number of symbols, LZ4's block and zlib's window.
    sources = [mixed(size, size) for size in (16_000, 20_000, 32_505, 32_506, 32_507, 65_535, 65_536, 65_537, 150_000)]
    sources.append(random.Random(3).randbytes(30_000))
    check(name, level, [b"abc", mixed(1, 700), mixed(2, 40_000)], sources, "compiled")


@pytest.mark.parametrize(("name", "level"), [("zlib", 1), ("zlib", 6), ("zlib", 9), ("gzip", 6)])
def test_copying_the_state_gives_the_plain_sizes(name, level):
    sources = [mixed(size, size) for size in (4095, 4096, 5000, 32_768, 70_000)]
    check(name, level, [b"x", mixed(5, 900)], sources, "library")


def test_copying_the_state_of_random_unicode(monkeypatch):
    monkeypatch.setattr(pair_sizes, "_COPY_FROM_BYTES", 0)
    draw = random.Random(7)

    def text():
        return "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(160, 0xD800)])) for _ in range(50))

    for level in (1, 3, 6, 9):
        sources, targets = [text().encode() for _ in range(20)], [text().encode() for _ in range(5)]
        check("zlib", level, [*targets, sources[0]], sources, "library")


def test_another_build_of_the_library_is_noticed_and_its_sizes_are_used(monkeypatch):
    pytest.importorskip("numba")
    compressor = make_compressor("zlib", 1)
    sizes = PairSizes(compressor, [b"some target text"], "compiled")
    real = zlib.compress
    monkeypatch.setattr(zlib, "compress", lambda data, level: real(data, level) + b"!")
    sources = [b"some source text", b"another one"]
    with pytest.warns(RuntimeWarning, match="compresses differently"):
        table = sizes(sources)
    np.testing.assert_array_equal(table, library_sizes(compressor, sizes.targets, sources))
    assert not sizes.plan(1)


@pytest.mark.parametrize("version", ["1.3.1.zlib-ng", "2.2.1"])
def test_forks_of_zlib_have_no_kernel(version, monkeypatch):
    monkeypatch.setattr(zlib, "ZLIB_RUNTIME_VERSION", version)
    with pytest.raises(UserError, match="no compiled kernel"):
        PairSizes(make_compressor("zlib", 1), [b"t"], "compiled")
    assert not PairSizes(make_compressor("zlib", 1), [b"t"], "auto").plan(10**9)


def test_auto_needs_enough_work_and_a_kernel(monkeypatch):
    pytest.importorskip("numba")
    assert not PairSizes(make_compressor("zlib", 6), [b"t"]).plan(10**9)
    assert PairSizes(make_compressor("zlib", 1), [b"t"]).plan(10**9)


def test_without_numba_the_library_is_used(monkeypatch):
    monkeypatch.setattr(pair_sizes.importlib.util, "find_spec", lambda name: None)
    sizes = PairSizes(make_compressor("zlib", 1), [b"target"])
    assert not sizes.plan(10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(sizes([b"abc"]), plain(sizes.compressor, [b"target"], [b"abc"]))
    monkeypatch.setitem(pair_sizes.sys.modules, "numba", None)
    with pytest.raises(UserError, match=r"modelwright\[speed\]"):
        PairSizes(make_compressor("zlib", 1), [b"target"], "compiled")
