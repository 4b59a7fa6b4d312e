"""What the documentation says must be true: its examples run and its commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from modelwright import catalog
from modelwright.cli import app

REPOSITORY = Path(catalog.__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(REPOSITORY))
)
def test_python_examples_run_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    for body in blocks(page, "python"):
        exec(compile(body, str(page), "exec"), namespace)


def commands():
    texts = [(page, body) for page in PAGES for body in blocks(page, "bash", "sh", "console", "shell")]
    texts += [(card.folder / "card.toml", card.command) for card in catalog.cards().values() if card.command]
    for page, body in texts:
        for line in body.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("modelwright "):
                yield pytest.param(line.split(" | ")[0].split(" > ")[0], id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_exist_with_their_options(line):
    words = shlex.split(line.split("  #")[0])[1:]
    built = app._commands()
    if " ".join(words[:2]) in built:
        words[:2] = [" ".join(words[:2])]
    assert words[0] in built or words[0].startswith("--"), f"no command {words[0]}"
    if words[0].startswith("--"):
        return
    command = built[words[0]].build()
    words = words[1:]
    while hasattr(command, "list_commands"):
        if not words or words[0].startswith("-"):
            return
        command, words = command.get_command(None, words[0]), words[1:]
        assert command is not None, line
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [w.split("=")[0] for w in words if re.match(r"--?[a-zA-Z]", w) and w.split("=")[0] not in known]
    assert not unknown, f"{line}: no option {unknown}"


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_nothing_names_a_machine_or_a_registry():
    hosts = ["pypi" + ".org", "files.python" + "hosted", "registry.npm" + "js", "/ro" + "ot/", "deb.deb" + "ian"]
    for path in [
        *REPOSITORY.glob("*"),
        *(p for f in ("src", "tests", "docs", "benchmarks", "results", ".ci") for p in (REPOSITORY / f).rglob("*")),
    ]:
        if path.is_file() and path.suffix in {
            ".py",
            ".md",
            ".toml",
            ".txt",
            ".json",
            ".yaml",
            ".yml",
            ".html",
            ".j2",
            "",
        }:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [h for h in hosts if h in text], path
