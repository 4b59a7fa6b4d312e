"""Seconds to rank documents by n-gram perplexity, against KenLM through its Python binding, in one run.

    python benchmarks/ngram_perplexity.py [--quick] [--output results/benchmarks/ngram-perplexity.json]

Both read the same model, an ARPA file of ours (5-grams of real text), and the same 100,000 documents (chunks of the
standard library, with different beginnings), and give every document's perplexity and the order. KenLM is the package
of that name with its default data structure (probing); it holds Python's lock, so its one core is compared with ours on
one core, and ours on two threads is shown beside it. Rounds are interleaved and the best of each is kept, in CPU and in
wall seconds. Perplexities must agree to 1e-4 in log10 a word. The floor is one pass over the bytes that only hashes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.errors import require
from modelwright.files import write_json
from modelwright.models.ngram import estimate
from modelwright.models.ngram_scoring import Lookup, _joined
from modelwright.provenance import machine, versions
from modelwright.worlds.stdlib_text import stdlib_text


def documents(count: int) -> tuple[list[str], list[str]]:
    """A pool, and a reference that is no part of it."""
    chunks = [row["text"] for row in stdlib_text(seed=0, target_chunks=50).pool]
    reference, rest = chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]
    return [rest[i % len(rest)][i // len(rest) * 7 :] or "x" for i in range(count)], reference


def measure(rounds: int, runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """CPU and wall seconds of the best round of each, interleaved, and the last results."""
    best: dict[str, tuple[float, float]] = {}
    results = {}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            results[name] = run()
            took = time.process_time() - processor, time.perf_counter() - wall
            best[name] = min(best.get(name, took), took)
    return best, results


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents, two rounds")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/ngram-perplexity.json"))
    options = parser.parse_args()
    kenlm = require("kenlm", "kenlm", "this benchmark")
    pool, reference = documents(10_000 if options.quick else 100_000)
    started = time.process_time()
    model = estimate(reference, 5)
    fitted = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        model.write_arpa(Path(folder) / "model.arpa")
        config = kenlm.Config()
        config.show_progress = False
        peer = kenlm.Model(str(Path(folder) / "model.arpa"), config)
    started = time.process_time()
    compiled, vectors = Lookup(model, "compiled"), Lookup(model, "numpy")
    prepared = time.process_time() - started
    compiled.score(pool[:10])  # numba compiles at first use

    def by_kenlm() -> np.ndarray:
        return np.array([peer.perplexity(text) for text in pool])

    def hashing() -> None:
        from modelwright.models.ngram_kernel import word_hashes

        word_hashes(*_joined([text.encode() for text in pool]))

    hashing()
    best, results = measure(
        2 if options.quick else 5,
        {
            "kenlm": lambda: (p := by_kenlm(), np.argsort(p))[0],
            "compiled": lambda: (p := compiled.score(pool).perplexity, np.argsort(p))[0],
            "compiled, 2 threads": lambda: (p := compiled.score(pool, workers=2).perplexity, np.argsort(p))[0],
            "numpy": lambda: (p := vectors.score(pool).perplexity, np.argsort(p))[0],
            "floor": hashing,
        },
    )
    off = float(np.abs(np.log10(results["compiled"]) - np.log10(results["kenlm"])).max())
    if off > 1e-4:
        raise SystemExit(f"the perplexities differ by {off} in log10")
    words = int(compiled.score(pool).tokens.sum())
    rows = {
        name: {
            "cpu_seconds": round(cpu, 4),
            "wall_seconds": round(wall, 4),
            "words_per_cpu_second": round(words / cpu),
            "times_as_fast_as_kenlm": round(best["kenlm"][0] / cpu, 3),
            "times_as_fast_as_kenlm_wall": round(best["kenlm"][1] / wall, 3),
        }
        for name, (cpu, wall) in best.items()
    }
    write_json(
        options.output,
        {
            "benchmark": "ngram-perplexity",
            "quick": options.quick,
            "documents": len(pool),
            "words": words,
            "ngrams": model.sizes,
            "fit_cpu_seconds": round(fitted, 3),
            "fit_words": sum(len(text.split()) for text in reference),
            "tables_cpu_seconds": round(prepared, 3),
            "largest_difference_log10": off,
            "asked": "compiled at least as fast as kenlm on one core",
            "met": best["compiled"][0] <= best["kenlm"][0],
            "results": rows,
            "versions": versions(),
            "machine": machine(),
        },
    )
    for name, row in rows.items():
        print(f"{name:22} {row['cpu_seconds']:8.3f} s CPU  {row['times_as_fast_as_kenlm']:6.2f} x kenlm")


if __name__ == "__main__":
    main()
