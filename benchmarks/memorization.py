"""Duplicate counts over a corpus that is not held in memory, and extraction in one pass, against the naive ways.

    python benchmarks/memorization.py [--quick] [--tokens 1000000000] [--output results/benchmarks/memorization.json]

A corpus of random tokens (Zipf's law, 50,000 of them, documents of 700 tokens, every tenth document a copy of an
earlier one) is written to a file, 100,000 windows of 32 tokens are drawn from it, and each way counts them in a
process of its own, whose peak memory is the largest sum, looked at twenty times a second, over it and its children; a
page that several share, such as one of the corpus, counts once. Asked: 1 GB of tokens in
under 4 GiB. The naive ways are measured on a part of the corpus, since they hold every window: a Counter of tuples,
and numpy's unique of all windows as rows of bytes; their rate is what compares.

Extraction: 32 + 32 tokens of a small Llama with random weights, by one teacher-forced pass a batch, by ``generate``
with a cache in the same batches, and by ``generate`` a sequence at a time, as a first script would do it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from modelwright.files import write_json
from modelwright.probing.memorization import count_duplicates
from modelwright.provenance import machine, versions

VOCABULARY, DOCUMENT, WINDOW, QUERIES = 50_000, 700, 32, 100_000
ASKED_GIB = 4.0
#: Tokens of which the naive ways are measured.
NAIVE = 5_000_000
#: Tokens of which our engine without numba is measured: it is slower, and its memory as flat.
PART = 50_000_000


def write_corpus(folder: Path, tokens: int) -> None:
    """Writes tokens.bin (uint16), boundaries.npy and windows.npy."""
    generator = np.random.default_rng(0)
    law = 1 / np.arange(1, VOCABULARY + 1)
    # A million draws of the law, from which all others are drawn: ten times as fast.
    table = np.searchsorted(np.cumsum(law) / law.sum(), generator.random(1 << 20)).astype(np.uint16)
    block = DOCUMENT * 2000
    with (folder / "tokens.bin").open("wb") as stream:
        for start in range(0, tokens, block):
            size = min(block, tokens - start)
            drawn = table[generator.integers(0, len(table), size, dtype=np.uint32)]
            whole = drawn[: size // DOCUMENT * DOCUMENT].reshape(-1, DOCUMENT)
            whole[9::10] = whole[8::10][: len(whole[9::10])]
            drawn.tofile(stream)
    np.save(folder / "boundaries.npy", np.arange(0, tokens, DOCUMENT))
    mapped = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    documents = generator.integers(0, tokens // DOCUMENT, QUERIES)
    starts = documents * DOCUMENT + generator.integers(0, DOCUMENT - WINDOW, QUERIES)
    np.save(folder / "windows.npy", mapped[starts[:, None] + np.arange(WINDOW)])


def count(folder: Path, way: str, tokens: int) -> dict[str, Any]:
    """Counts in this process; returns seconds, peak memory and the sum of counts."""
    windows = np.load(folder / "windows.npy")
    mapped = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    boundaries = np.load(folder / "boundaries.npy", mmap_mode="r")
    engine, _, rest = way.partition(" ")
    workers = int(rest) if rest.isdigit() else 1
    if engine == "compiled":  # compiled once, and kept by numba for later runs
        count_duplicates(mapped[:10_000], windows[:10], engine="compiled")
    started = time.perf_counter()
    if engine in ("compiled", "numpy"):
        boundaries = boundaries[: -(-tokens // DOCUMENT)]
        counts = count_duplicates(
            mapped[:tokens], windows, document_boundaries=boundaries, engine=engine, workers=workers
        )
    else:
        counts = (count_tuples if way == "Counter of tuples" else count_rows)(np.array(mapped[:tokens]), windows)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "sum": int(counts.sum())}


def watched(command: list[str]) -> dict[str, Any]:
    """Runs a process that prints an object; returns it with the peak of its and its children's memory."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        own = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
                peak = max(peak, sum(p.memory_full_info().pss for p in (own, *own.children(recursive=True))))
            time.sleep(0.05)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {**json.loads(printed), "gib": peak / 2**30}


def count_tuples(tokens: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Looks every window up in a dictionary of the queries, as tuples."""
    wanted = {tuple(w): 0 for w in windows.tolist()}
    held = tokens.tolist()
    for start in range(0, len(held), DOCUMENT):
        document = held[start : start + DOCUMENT]
        for i in range(len(document) - WINDOW + 1):
            key = tuple(document[i : i + WINDOW])
            if key in wanted:
                wanted[key] += 1
    return np.array([wanted[tuple(w)] for w in windows.tolist()])


def count_rows(tokens: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Sorts all windows as rows of bytes."""
    row = np.dtype((np.void, 2 * WINDOW))
    whole = tokens[: len(tokens) // DOCUMENT * DOCUMENT].reshape(-1, DOCUMENT)
    every = np.lib.stride_tricks.sliding_window_view(whole, WINDOW, axis=1).reshape(-1, WINDOW)
    unique, counts = np.unique(np.ascontiguousarray(every).view(row).ravel(), return_counts=True)
    asked = np.ascontiguousarray(windows.astype(np.uint16)).view(row).ravel()
    known = dict(zip(unique.tolist(), counts.tolist()))
    return np.array([known.get(a, 0) for a in asked.tolist()])


def duplicates(tokens: int, rounds: int) -> list[dict[str, Any]]:
    part = min(PART, tokens)
    ways = {"compiled": tokens, "compiled 2": tokens, "numpy": part, "numpy 2": part}
    ways |= {"Counter of tuples": min(NAIVE, tokens), "numpy.unique of rows": min(NAIVE, tokens)}
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name), tokens)
        for _ in range(rounds):
            for way, size in ways.items():
                command = [sys.executable, __file__, "--child", name, "--way", way, "--tokens", str(size)]
                done = watched(command)
                if way not in best or done["seconds"] < best[way]["seconds"]:
                    best[way] = done
    for size in set(ways.values()):
        same = {best[w]["sum"] for w, own in ways.items() if own == size}
        assert len(same) == 1, f"the engines disagree over {size} tokens: {same}"
    naive = best["Counter of tuples"]["seconds"] / ways["Counter of tuples"]
    rows = []
    for way, found in best.items():
        engine, _, workers = way.partition(" ")
        ours = engine in ("compiled", "numpy") and "." not in engine
        rows.append(
            {
                "task": "duplicate counts",
                "way": f"{engine}, {workers or 1} process{'es' if workers else ''}" if ours else way,
                "tokens": ways[way],
                "million tokens/s": round(ways[way] / found["seconds"] / 1e6, 2),
                "÷ Counter": round(naive / (found["seconds"] / ways[way]), 1),
                "peak GiB": round(found["gib"], 2),
                "asked GiB": ASKED_GIB if ours else None,
            }
        )
    return rows


def extraction(sequences: int, rounds: int) -> list[dict[str, Any]]:
    import torch

    from modelwright.models.tiny import tiny_model
    from modelwright.probing.memorization import extractability

    model = tiny_model("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = np.random.default_rng(0).integers(3, 259, (sequences, 64))
    few = tokens[: max(4, sequences // 32)]
    ways = {
        "teacher-forced, batches of 64": lambda: extractability(model, tokens, batch_size=64),
        "generate with a cache, batches of 64": lambda: extractability(model, tokens, method="generate", batch_size=64),
        "generate, a sequence at a time": lambda: extractability(model, few, method="generate", batch_size=1),
    }
    sizes = dict(zip(ways, (sequences, sequences, len(few))))
    seconds: dict[str, float] = {}
    verdicts = {}
    for _ in range(rounds + 1):  # the first warms up
        for way, run in ways.items():
            started = time.perf_counter()
            verdicts[way] = run().memorized
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[way] = min(seconds.get(way, 1e9), time.perf_counter() - started)
    first = verdicts["teacher-forced, batches of 64"]
    assert all((v == first[: len(v)]).all() for v in verdicts.values()), "the tests disagree"
    rates = {way: sizes[way] / seconds[way] for way in ways}
    slowest = rates["generate, a sequence at a time"]
    return [
        {
            "task": "extraction",
            "way": way,
            "sequences": sizes[way],
            "sequences/s": round(rate, 1),
            "÷ one at a time": round(rate / slowest, 1),
        }
        for way, rate in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small corpus: to see that it runs")
    parser.add_argument("--tokens", type=int, help="tokens of the corpus; 10^9 (1 GB of tokens is at most that)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/memorization.json"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(count(options.child, options.way, options.tokens)))
        return
    tokens = options.tokens or (3_000_000 if options.quick else 1_000_000_000)
    rounds = 1 if options.quick else options.rounds
    rows = duplicates(tokens, rounds) + extraction(64 if options.quick else 2048, rounds)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
    result = {
        "benchmark": "memorization",
        "title": "Memorisation: duplicate counts and extraction",
        "question": "Does counting windows over a corpus stay within bounded memory, and what does one pass save?",
        "rows": rows,
        "notes": "Pages of the corpus's file (2 bytes a token) count as held, once. Where a machine has one core, two "
        "processes share it, and their rows show only what they hold.",
        "command": f"python benchmarks/memorization.py --tokens {tokens}",
    }
    write_json(options.output, result | {"machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
