"""Pairs per second of ZIP-FIT against the published package, the plain definition and DSIR's package, in one run.

    python benchmarks/zip_fit.py [--quick] [--peers FOLDER] [--memory] [--output results/benchmarks/zip-fit.json]

The peers are not dependencies. They are measured if they can be imported, from the environment or from a folder made by
    python -m pip install --no-deps --target FOLDER zip-fit==1.0.9 data-selection==1.0.3 nltk

Everybody scores the same pool of documents of the standard library against the same 50 targets with 2 workers, at the
same compressor and level; rounds are interleaved, and the best of each is kept, since other work on a machine only ever
slows. Scores are compared: ours must equal the definition's exactly, and the package's to rounding. The floor is what 2
cores could do if calling the compression library once per pair cost nothing else; the compiled engine may pass it,
since it reads every source once instead of once per target.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.curation.zip_fit import CompressionAligner, alignment, make_compressor
from modelwright.errors import UserError
from modelwright.files import write_json
from modelwright.provenance import machine, versions
from modelwright.worlds.stdlib_text import stdlib_text

WORKERS = 2
TARGETS = 50
#: Compressor, level, the ratio to the published package that is asked for.
CASES = (("gzip", 1, 2.0), ("zlib", 1, None), ("lz4", 0, 4.0))


def pool_and_targets(documents: int) -> tuple[list[str], list[str]]:
    """Real text: chunks of the standard library, repeated with different beginnings if there are too few."""
    world = stdlib_text(seed=0, target_chunks=TARGETS)
    chunks = [row["text"] for row in world.pool]
    pool = [chunks[i % len(chunks)][i // len(chunks) * 7 :] for i in range(documents)]
    return pool, [row["text"] for row in world.target]


def best_of(rounds: int, runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of the fastest round of each, rounds interleaved, and the last results."""
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                results[name] = run()
            took = time.perf_counter() - started
            seconds[name] = min(seconds.get(name, took), took)
    return seconds, results


def published_zip_fit(compressor: str, level: int, pool: list[str], targets: list[str]) -> Callable[[], Any] | None:
    """The published package's own ranking, with as many processes as ours (it asks for the number of cores)."""
    if compressor not in ("gzip", "lz4"):
        return None
    try:
        from zip_fit import zipfit
    except ImportError:
        return None
    zipfit.cpu_count = lambda: WORKERS
    package = zipfit.ZIPFIT("", "", len(pool), compression_algorithm=compressor, compress_level=level)
    return lambda: package.rank_sequences_by_alignment(pool, targets)


def definition(pool: Sequence[str], targets: Sequence[str], compressor: str, level: int) -> list[float]:
    return [alignment(text, targets, compressor, level) for text in pool]


def floor(compressor: str, level: int, pool: Sequence[str], targets: Sequence[str], pairs: int = 5000) -> float:
    """Seconds a pair in the library's compress on one core: concatenations made before, calls included."""
    size = make_compressor(compressor, level).size
    encoded = [t.encode() for t in targets]
    step = max(1, len(pool) * len(targets) // pairs)
    texts = [
        pool[k // len(targets)].encode() + encoded[k % len(targets)] for k in range(0, len(pool) * len(targets), step)
    ]
    took = []
    for _ in range(3):
        started = time.perf_counter()
        for text in texts:
            size(text)
        took.append(time.perf_counter() - started)
    return min(took) / len(texts)


def throughput(documents: int, rounds: int) -> list[dict[str, Any]]:
    pool, targets = pool_and_targets(documents)
    pairs = len(pool) * len(targets)
    found = []
    for compressor, level, asked in CASES:
        runs: dict[str, Callable[[], Any]] = {}
        if peer := published_zip_fit(compressor, level, pool, targets):
            runs["published zip-fit"] = peer
        for engine in ("library", "compiled"):
            try:
                aligner = CompressionAligner(targets, compressor, level, engine=engine)
            except UserError as error:
                print(f"{compressor}: {error}")
                continue
            aligner.score(pool[:600], WORKERS)  # starts the workers, compiles the kernel
            runs[f"modelwright, {engine}"] = functools.partial(aligner.score, pool, WORKERS)
        small = pool[: max(1, documents // 40)]
        plain = functools.partial(definition, small, targets, compressor, level)
        runs["plain definition, 1 core, 1/40 of the pool"] = plain
        seconds, results = best_of(rounds, runs)
        scores = {name: value for name, value in results.items() if name.startswith("modelwright")}
        expected = np.array(results["plain definition, 1 core, 1/40 of the pool"])
        for name, value in scores.items():
            assert np.array_equal(value[: len(small)], expected), f"{name} differs from the definition"
        if "published zip-fit" in results:
            theirs = np.sort([score for _, score in results["published zip-fit"]])
            for name, value in scores.items():
                # The package takes the mean of 1 - NCD, we 1 - the mean: the same but for rounding.
                np.testing.assert_allclose(np.sort(value), theirs, rtol=0, atol=1e-12, err_msg=name)
        rates = {name: pairs / (40 if name.startswith("plain") else 1) / value for name, value in seconds.items()}
        ours = max(rates[name] for name in scores)
        row = {
            "compressor": compressor,
            "level": level,
            "pairs": pairs,
            "pairs_per_second": {name: round(rate) for name, rate in rates.items()},
            "floor_pairs_per_second": round(WORKERS / floor(compressor, level, pool, targets)),
            "asked_ratio": asked,
        }
        if "published zip-fit" in rates:
            row["ratio_to_published"] = round(ours / rates["published zip-fit"], 2)
        row["share_of_floor"] = round(ours / row["floor_pairs_per_second"], 2)
        found.append(row)
        print(json.dumps(row, indent=1))
    return found


def against_dsir(documents: int) -> dict[str, Any]:
    """Seconds from files to a selection: DSIR's package, our DSIR, our ZIP-FIT."""
    from modelwright.curation.dsir import DsirSelector
    from modelwright.curation.zip_fit import ZipFitSelector

    pool, targets = pool_and_targets(documents)
    zip_fit = ZipFitSelector().fit(targets)
    zip_fit.score(pool[:5000], WORKERS)

    def ours() -> Any:
        return ZipFitSelector().fit(targets).score(pool, WORKERS)

    def our_dsir() -> Any:
        return DsirSelector(min_tokens=1).fit(targets, pool).score(pool, WORKERS)

    runs: dict[str, Callable[[], Any]] = {"modelwright zip-fit (zlib 1)": ours, "modelwright dsir": our_dsir}
    try:
        from data_selection import HashedNgramDSIR
    except ImportError:
        print("data-selection is not installed: left out")
    else:

        def theirs() -> Any:
            with tempfile.TemporaryDirectory() as folder:
                paths = {}
                for name, texts in (("raw", pool), ("target", targets)):
                    paths[name] = Path(folder) / f"{name}.jsonl"
                    paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
                dsir = HashedNgramDSIR(
                    [str(paths["raw"])],
                    [str(paths["target"])],
                    f"{folder}/cache",
                    num_proc=WORKERS,
                    min_example_length=1,
                )
                dsir.fit_importance_estimator(num_tokens_to_fit="all")
                dsir.compute_importance_weights()
                dsir.resample(out_dir=f"{folder}/out", num_to_sample=documents // 10, cache_dir=f"{folder}/resampled")

        runs["published data-selection (DSIR)"] = theirs
    seconds, _ = best_of(1, runs)
    found = {"documents": documents, "seconds": {name: round(value, 2) for name, value in seconds.items()}}
    print(json.dumps(found, indent=1))
    return found


_MEMORY = """
import json, resource, sys
from modelwright.curation.choose import Rule
from modelwright.curation.stream import Outputs, select_records
from modelwright.curation.zip_fit import ZipFitSelector
from modelwright.data import Records
from pathlib import Path
pool, target, output = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(target)]
selector = ZipFitSelector(compressor="lz4")
select_records(selector, Records(pool), texts, Rule(top=1000), Outputs(chosen=Path(output)), workers=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def memory(counts: Sequence[int]) -> dict[str, Any]:
    """Peak resident memory (MiB) of selecting from pools of different sizes, each in a process of its own."""
    chunks, targets = pool_and_targets(3000)
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target.jsonl"
        target.write_text("".join(json.dumps({"text": text[:200]}) + "\n" for text in targets))
        for count in counts:
            pool = Path(folder) / f"{count}.jsonl"
            with pool.open("w") as stream:
                for i in range(count):
                    stream.write(json.dumps({"text": f"{i} {chunks[i % len(chunks)][:200]}"}) + "\n")
            command = [sys.executable, "-c", _MEMORY, str(pool), str(target), f"{folder}/{count}.chosen.jsonl"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
            peaks[str(count)] = int(done.stdout.split()[-1])
            print(f"{count:,} documents: peak {peaks[str(count)]} MiB")
            pool.unlink()
    return {"peak_mib": peaks, "more_mib": max(peaks.values()) - peaks[str(counts[0])], "asked_below_mib": 100}


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    rows = [
        {
            "compressor": f"{case['compressor']} level {case['level']}",
            **{f"{name} (pairs/s)": rate for name, rate in case["pairs_per_second"].items()},
            "one library call a pair, 2 cores (pairs/s)": case["floor_pairs_per_second"],
            "compiled ÷ published": case.get("ratio_to_published"),
            "asked": case["asked_ratio"],
        }
        for case in result["throughput"]
    ]
    seconds = [{"who": name, "seconds": value} for name, value in result["time_to_select"]["seconds"].items()]
    return {
        "title": "ZIP-FIT: pairs per second",
        "question": "How fast are all pairs of 20,000 documents and 50 targets scored, with 2 workers?",
        "tables": {"Throughput": rows, "Scoring 20,000 documents": seconds},
        "command": "python benchmarks/zip_fit.py --peers FOLDER",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the documents, one round; no result is written"
    )
    parser.add_argument("--peers", type=Path, help="folder with the published packages")
    parser.add_argument("--memory", action="store_true", help="also measure memory up to a million documents")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/zip-fit.json"))
    arguments = parser.parse_args()
    # This file has the published package's name, and must not be found in its place.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    if arguments.peers:
        sys.path.insert(0, str(arguments.peers))
    documents = 2000 if arguments.quick else 20_000
    result: dict[str, Any] = {
        "benchmark": "zip-fit",
        "workers": WORKERS,
        "targets": TARGETS,
        "throughput": throughput(documents, 1 if arguments.quick else 3),
        "time_to_select": against_dsir(documents),
    }
    if arguments.memory:
        result["memory"] = memory((1000, 10_000) if arguments.quick else (10_000, 100_000, 1_000_000))
    result |= {**tables(result), "machine": machine(), "versions": versions()}
    if not arguments.quick:
        write_json(arguments.output, result)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
