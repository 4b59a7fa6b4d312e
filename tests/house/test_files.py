import errno
import shutil
import sys

import pytest
from safetensors import SafetensorError

from modelwright.errors import UserError, did_you_mean, require
from modelwright.files import atomic_path, check_output, content_hash, read_json, write_json


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_a_file_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "out.txt"
    with atomic_path(target) as partial:
        partial.write_text("half")
        assert not target.exists()
    assert target.read_text() == "half"
    assert leftovers(target.parent) == []


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_nothing_is_left_after_an_exception_and_the_old_file_is_kept(tmp_path, exception):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(exception), atomic_path(target, force=True) as partial:
        partial.write_text("new")
        raise exception
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def interrupted_at(moment, function):
    """Calls a function with Ctrl-C at the nth moment at which Python listens for it; returns whether it came."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        if event in ("call", "c_return"):
            count += 1
            if count == moment:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("old", ["file", "folder", "nothing"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_ctrl_c_at_any_moment_leaves_the_old_or_the_new_and_nothing_else(tmp_path, old, new):
    target = tmp_path / "out"

    def put(path, kind, text):
        if kind == "folder":
            path.mkdir()
            path = path / "file"
        path.write_text(text)

    def write():
        with atomic_path(target, force=True) as partial:
            put(partial, new, "new")

    moment = 1
    while True:
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        if old != "nothing":
            put(target, old, "old")
        came = interrupted_at(moment, write)
        found = target / "file" if target.is_dir() else target
        assert (found.read_text() if found.exists() else "nothing") in ("new", "nothing" if old == "nothing" else "old")
        assert leftovers(tmp_path) == [], moment
        if not came:
            break
        moment += 1
    assert moment > 50


@pytest.mark.parametrize("old", ["file", "folder", "nothing"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_file_or_folder_replaces_either(tmp_path, old, new):
    target = tmp_path / "out"
    if old == "file":
        target.write_text("old")
    elif old == "folder":
        target.mkdir()
        (target / "old.txt").write_text("old")
    with atomic_path(target, force=True) as partial:
        if new == "file":
            partial.write_text("new")
        else:
            partial.mkdir()
            (partial / "new.txt").write_text("new")
    assert (target.read_text() if new == "file" else [p.name for p in target.iterdir()]) == (
        "new" if new == "file" else ["new.txt"]
    )
    assert leftovers(tmp_path) == []


def test_an_existing_output_is_refused(tmp_path):
    with pytest.raises(UserError, match="give --force"):
        check_output(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file" / "out")


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        pytest.raises(UserError, match="the disk is full. Nothing of it was left behind"),
        atomic_path(tmp_path / "o") as p,
    ):
        p.write_text("some")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_same_sentence_where_a_library_in_rust_writes(tmp_path):
    def written(message):
        with atomic_path(tmp_path / "model") as partial:
            partial.mkdir()
            raise SafetensorError(message)

    with pytest.raises(UserError, match=r"model could not be written: the disk is full. Nothing of it was left"):
        written("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="header"):
        written("invalid header")
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "d.json")


def test_the_content_hash_sees_names_and_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "b" / "x").write_text("1")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_messages():
    assert did_you_mean("zipfit", ["zip-fit", "dsir"]) == "did you mean 'zip-fit'?"
    assert did_you_mean("qqq", ["b", "a"]) == "known: a, b."
    many = did_you_mean("qqq", [f"{n:05d}" for n in range(14_000)])
    assert many.endswith("00038, 00039 and 13,960 more.")
    with pytest.raises(UserError, match=r"pip install 'modelwright\[extra\]'"):
        require("no_such_package_at_all", "extra", "testing")
