import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from modelwright.recipes.store import code_identity

HERE = Path(__file__).parent
DRIVER = """
import os, sys
import fake_verbs, modelwright.recipes.run
from modelwright.verbs import VERBS
VERBS.update(fake_verbs.VERBS)
modelwright.recipes.run._render = lambda folder: None
modelwright.recipes.store.code_identity = lambda: {}
from modelwright.cli import main
main()
"""


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    """Makes the fake verbs known here and in workers, and works in an empty folder."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "executed.txt"))
    import fake_verbs

    import modelwright.recipes.run
    from modelwright.verbs import VERBS

    for name, target in fake_verbs.VERBS.items():
        monkeypatch.setitem(VERBS, name, target)
    monkeypatch.setattr(modelwright.recipes.run, "_render", lambda folder: None)
    # Otherwise an edit of the source while the tests run would change keys in the middle of one.
    monkeypatch.setattr(modelwright.recipes.store, "code_identity", dict)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def real_code_identity():
    """Returns what the autouse fixture replaces."""
    code_identity.cache_clear()
    yield code_identity
    code_identity.cache_clear()


@pytest.fixture
def write():
    """Writes a recipe and returns its path."""

    def write(text, name="recipe.yaml"):
        Path(name).write_text(textwrap.dedent(text).lstrip("\n"))
        return name

    return write


@pytest.fixture
def executed(tmp_path):
    """Returns what verbs have really done since the last call."""

    def read():
        path = tmp_path / "executed.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(lines)

    return read


@pytest.fixture
def modelwright():
    """Starts the command line with the fake verbs."""

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
