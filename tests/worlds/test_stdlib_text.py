import sys
import types

import pytest

from modelwright.errors import UserError
from modelwright.worlds.base import Draw
from modelwright.worlds.stdlib_text import (
    LONG_LINE,
    chunks,
    library_files,
    reference_passages,
    split_source,
    stdlib_text,
)


@pytest.fixture(scope="module")
def world():
    return stdlib_text(0)


def long_lines(rows):
    lines = (line.strip() for row in rows for line in row["text"].splitlines())
    return {line for line in lines if len(line) >= LONG_LINE}


def reference(rows):
    return [row for row in rows if row["kind"] == "reference"]


def test_default_sizes(world):
    counts = world.counts
    assert counts["pool"]["rows"] == 3000
    assert counts["target"] == {"rows": 40, "reference": 40}
    assert counts["heldout"] == {"rows": 60, "reference": 60}
    assert 150 < counts["pool"]["reference"] < 450
    others = 3000 - counts["pool"]["reference"]
    assert counts["pool"]["docstring"] == round(others / 4)


def test_sizes_of_chunks(world):
    for row in (*world.pool, *world.target, *world.heldout):
        assert 600 <= len(row["text"].encode()) <= 1100
        assert row["text"].splitlines()[0].strip()
        assert row["text"].splitlines()[-1].strip()


def test_splits_share_no_topic_and_no_sentence(world):
    topics = [{row["name"] for row in reference(rows)} for rows in (world.pool, world.target, world.heldout)]
    assert len(set().union(*topics)) == sum(map(len, topics))
    assert min(map(len, topics)) >= 3
    # Not only the reference: docstrings must not quote the evaluation either.
    lines = [long_lines(rows) for rows in (world.pool, world.target, world.heldout)]
    assert min(map(len, lines)) > 300
    assert len(set().union(*lines)) == sum(map(len, lines))


def test_no_chunk_twice(world):
    texts = [row["text"] for row in (*world.pool, *world.target, *world.heldout)]
    assert len(set(texts)) == len(texts)


def test_no_topic_is_most_of_the_target(world):
    names = [row["name"] for row in world.target]
    assert max(map(names.count, names)) <= 14


def test_same_files_and_seed_give_the_same_bytes(world):
    again = stdlib_text(0)
    assert again.fingerprint() == world.fingerprint() != stdlib_text(1).fingerprint()
    assert "root" not in again.parameters


def test_order_of_the_pool_does_not_tell_the_kind(world):
    first = sum(row["kind"] == "reference" for row in world.pool[:1500])
    assert 0.35 < first / world.counts["pool"]["reference"] < 0.65


def test_splitting_a_module():
    source = b'''\xef\xbb\xbf"""Module."""
X = """no docstring"""  # kept

class A:
    """Class

    body."""
    def f(self):
        "One line."

if X:
    def g():
        """Inner."""
'''.replace(b"\n", b"\r\n")
    docstrings, code = split_source(source)
    assert docstrings == "Module.\n\nClass\n\nbody.\n\nOne line.\n\nInner."
    assert 'X = """no docstring"""  # kept' in code
    assert "Inner" not in code
    assert "body" not in code
    assert "\r" not in code


@pytest.mark.parametrize("source", [b"def f(:\n", b"x = '\xff'\n", b"x = 1\0\n", b"print 'two'\n"])
def test_modules_that_do_not_parse_are_passed_over(source):
    assert split_source(source) == ("", "")


def test_a_form_feed_does_not_shift_lines():
    docstrings, code = split_source(b'x = 1\n\x0c\ndef f():\n    """Doc."""\n    return x\n')
    assert docstrings == "Doc."
    assert "Doc" not in code
    assert "return x" in code


def test_chunks_cover_the_text_in_order():
    lines = [f"{i:03} " + "x" * (i % 50) for i in range(500)]
    pieces = list(chunks("\n".join(lines), Draw(0, "x"), 200, 400))
    joined = "\n".join(pieces).split("\n")
    assert joined == lines[: len(joined)]
    assert len(lines) - len(joined) < 20
    assert all(200 <= len(piece) <= 400 for piece in pieces)


def test_chunks_leave_out_what_cannot_be_one():
    assert list(chunks("short", Draw(0, "x"), 200, 400)) == []
    assert list(chunks("y" * 500, Draw(0, "x"), 200, 400)) == []
    pieces = list(chunks("é" * 150 + "\n\n\n", Draw(0, "x"), 200, 400))
    assert pieces in ([], ["é" * 150])


def test_the_smaller_topic_keeps_a_shared_line():
    shared = "a sentence that is long enough to count as one of its own"
    topics = {
        "umbrella": f"{shared}\nbefore\n{shared}!\nafter, with more words than the other topic has",
        "part": shared,
    }
    passages = reference_passages(topics)
    assert passages["part"] == [shared]
    assert passages["umbrella"] == [f"before\n{shared}!\nafter, with more words than the other topic has"]


def test_left_out_folders(tmp_path):
    for name in ("a.py", "b.txt", "pkg/c.py", "test/d.py", "pkg/tests/e.py", "site-packages/f.py", "html/entities.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    assert library_files(tmp_path) == ["a.py", "pkg/c.py"]


def test_a_library_that_is_too_small(tmp_path):
    with pytest.raises(UserError, match="fewer than the"):
        stdlib_text(0, root=tmp_path)
    with pytest.raises(UserError, match="ask for fewer"):
        stdlib_text(0, target_chunks=2000)


def test_a_python_without_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="pydoc_data"):
        stdlib_text(0)


def test_same_files_elsewhere(tmp_path, monkeypatch):
    """Another folder and a frozen reference: only content counts, not where it is."""
    body = "\n".join(f"    value_{i} = compute(value_{i - 1}, {i})" for i in range(1, 400))
    monkeypatch.setitem(
        sys.modules,
        "pydoc_data.topics",
        types.SimpleNamespace(
            topics={
                f"t{t}": "\n".join(f"Topic {t} says sentence {i} about nothing at all." for i in range(90))
                for t in range(12)
            }
        ),
    )
    prints = []
    for folder in ("one", "two"):
        for module in range(4):
            path = tmp_path / folder / f"m{module}.py"
            path.parent.mkdir(exist_ok=True)
            lines = [f"Module {module} has a line {i} of documentation in it." for i in range(300)]
            # Here a docstring quotes every topic, so some of it quotes the held-out ones.
            lines[50:250:10] = [f"Topic {i % 12} says sentence {i} about nothing at all." for i in range(20)]
            docs = "\n".join(lines)
            path.write_text(f'"""{docs}\n"""\ndef f{module}():\n{body}\n'.replace("value", f"value{module}"))
        sizes = {"pool_chunks": 60, "target_chunks": 6, "heldout_chunks": 6, "docstring_share": 0.7}
        world = stdlib_text(0, **sizes, root=tmp_path / folder)
        lines = [long_lines(rows) for rows in world.splits().values()]
        assert len(set().union(*lines)) == sum(map(len, lines))
        prints.append(world.fingerprint())
    assert prints == ["201c058803cef7bef2770708498d87aa490ccbebc394e7a3e5e2abfe7b6ca2ea"] * 2
