"""The rules of the house that no reviewer should have to remember."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from modelwright import catalog

SOURCE = Path(catalog.__file__).parent
REPOSITORY = SOURCE.parents[1]
FLOORS = [
    {"errors", "files", "options", "progress", "provenance", "catalog", "values", "processes", "__init__"},
    {"kernels", "data", "worlds", "models"},
    set(catalog.STAGES),
    {"verify", "recipes", "report", "verbs"},
    {"cli", "__main__"},
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules():
    return sorted(SOURCE.rglob("*.py"))


def imported(path):
    """Yields every modelwright module that a file imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        yield from (n.split(".") for n in names if n.split(".")[0] == "modelwright" and "." in n)


def place(path):
    return [part.removesuffix(".py") for part in path.relative_to(SOURCE).parts]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_import_points_upwards(path):
    here = place(path)
    for target in imported(path):
        if here[-1] == "claim":
            continue
        assert FLOOR_OF[target[1]] <= FLOOR_OF[here[0]], f"{path} imports {'.'.join(target)}"


def test_no_method_imports_another():
    folders = {card.folder: card for card in catalog.cards().values()}
    for path in modules():
        owner = next((f for f in folders if f in path.parents), None)
        if owner is None or path.name == "claim.py":
            continue
        for target in imported(path):
            other = SOURCE.joinpath(*target[1:3])
            assert other == owner or other not in folders, f"{path} imports {'.'.join(target)}"


def test_every_wing_and_file_has_a_floor():
    for path in modules():
        assert place(path)[0] in FLOOR_OF, path


def test_files_stay_readable():
    too_long = {str(p): n for p in modules() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 600}
    assert not too_long


def test_the_verbs_and_the_catalog_import_nothing_heavy():
    heavy = "torch transformers datasets numpy pandas pyarrow pydantic yaml rich jinja2 matplotlib sklearn"
    program = (
        "import sys\n"
        "from modelwright.verbs import VERBS, load_verb\n"
        "import modelwright.cli, modelwright.catalog\n"
        "[load_verb(v) for v in VERBS]; modelwright.catalog.cards()\n"
        f"print([m for m in {heavy.split()!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
