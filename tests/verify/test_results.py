import json
import subprocess
import sys

import pytest

from modelwright.verify import results


def write(folder, method, scale, date, verdict="holds", **more):
    (folder / "claims").mkdir(exist_ok=True, parents=True)
    document = {"format": 1, "method": method, "scale": scale, "date": date, "verdict": verdict, "seeds": [0], **more}
    (folder / "claims" / results.file_name(method, scale)).write_text(json.dumps(document))


def test_latest_is_the_newest_that_counts(tmp_path):
    assert results.latest("foo", tmp_path) is None
    write(tmp_path, "foo", "miniature", "2030-01-01")
    assert results.latest("foo", tmp_path) is None
    write(tmp_path, "foo", "cpu", "2025-02-01", "holds in part")
    write(tmp_path, "foo", "gpu", "2025-01-01")
    assert results.latest("foo", tmp_path)["verdict"] == "holds in part"
    write(tmp_path, "foo", "gpu", "2025-02-01")
    assert results.latest("foo", tmp_path)["scale"] == "gpu"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "method": "foo"}', "\xff"])
def test_an_unreadable_result_is_no_evidence(tmp_path, text):
    write(tmp_path, "foo", "cpu", "2025-01-01")
    (tmp_path / "claims" / "foo.cpu.json").write_bytes(text.encode("latin-1"))
    assert results.latest("foo", tmp_path) is None
    assert results.claims(tmp_path) == []


def test_reading_results_imports_nothing_heavy():
    code = "import sys; import modelwright.verify.results as r; r.latest('x'); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not any(
        f"'{name}'" in loaded for name in ("torch", "numpy", "pydantic", "rich", "jinja2", "multiprocessing")
    )
