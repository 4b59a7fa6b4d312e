"""What SWE's training costs beside the BPE trainer of ``tokenizers``, and beside a rescan for each merge.

    python benchmarks/swe.py [--quick] [--output results/benchmarks/swe.json]

The text is every Python file of the running installation, up to 50 MB. Both trainers read the same list of texts, use
the same words and the same smallest frequency, and are timed from texts to tokenizer, interleaved, the best of the
rounds. The naive way counts all pairs anew for each merge; it is timed on a small part of the text and few merges.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelwright.files import write_json
from modelwright.models.tokenizers import train_bpe
from modelwright.provenance import machine, versions
from modelwright.tokenization.swe import LikelihoodBpeTrainer, fit
from modelwright.tokenization.swe.likelihood import greedy_merges
from modelwright.tokenization.swe.merging import PairIndex
from modelwright.tokenization.swe.words import byte_alphabet, count_words


def python_files(megabytes: float) -> list[str]:
    texts, size = [], 0.0
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            texts.append(text)
            size += len(text.encode()) / 1e6
            if size >= megabytes:
                return texts
    return texts


def best_of(rounds: int, ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    seconds = {name: float("inf") for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def against_bpe(texts: list[str], size: int, rounds: int) -> dict[str, Any]:
    made: dict[str, Any] = {}

    def bpe() -> None:
        made["bpe"] = train_bpe(texts, size, min_frequency=2)

    def swe() -> None:
        made["swe"] = LikelihoodBpeTrainer(vocab_size=size, min_frequency=2).train_from_iterator(texts)

    seconds = best_of(rounds, {"bpe": bpe, "swe": swe})
    sample = texts[:: max(1, len(texts) // 300)]
    fits = {name: fit(tokenizer, sample) for name, tokenizer in made.items()}
    return {
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 1),
        "merges": size - 259,
        "seconds": seconds,
        "ratio": seconds["swe"] / seconds["bpe"],
        "bits_per_character_of_a_sample": {name: f.bits_per_character for name, f in fits.items()},
        "characters_per_token_of_a_sample": {name: f.characters_per_token for name, f in fits.items()},
    }


def against_rescan(texts: list[str], merges: int) -> dict[str, Any]:
    words, _ = count_words(texts, "byte")
    found: dict[str, list[Any]] = {}

    def fast() -> None:
        found["fast"] = list(PairIndex(byte_alphabet(), list(words), list(words.values())).merges(merges))

    def rescan() -> None:
        found["rescan"] = greedy_merges({tuple(word): n for word, n in words.items()}, merges)

    seconds = best_of(1, {"fast": fast, "rescan": rescan})
    same = [m.pair for m in found["fast"]] == [m.pair for m in found["rescan"]]
    return {
        "words": len(words),
        "merges": merges,
        "seconds": seconds,
        "times_faster": seconds["rescan"] / seconds["fast"],
        "same_merges": same,
    }


def page(result: dict[str, Any]) -> dict[str, Any]:
    peer, naive = result["against_bpe"], result["against_rescan"]
    return {
        "title": "SWE: training a tokenizer by likelihood",
        "question": "What does it cost to choose each merge by its exact gain in likelihood?",
        "tables": {
            "Beside the BPE trainer of tokenizers": [
                {
                    "text (MB)": peer["megabytes"],
                    "merges": peer["merges"],
                    "BPE (s)": peer["seconds"]["bpe"],
                    "SWE (s)": peer["seconds"]["swe"],
                    "SWE ÷ BPE (asked at most 10)": peer["ratio"],
                    "bits per character, BPE": peer["bits_per_character_of_a_sample"]["bpe"],
                    "bits per character, SWE": peer["bits_per_character_of_a_sample"]["swe"],
                }
            ],
            "Beside a rescan for each merge": [
                {
                    "different words": naive["words"],
                    "merges": naive["merges"],
                    "rescan (s)": naive["seconds"]["rescan"],
                    "index (s)": naive["seconds"]["fast"],
                    "times faster": naive["times_faster"],
                    "same merges": naive["same_merges"],
                }
            ],
        },
        "notes": "Bits per character of a sample of the texts, each token coded by its frequency there. BPE's trainer "
        "is compiled and uses all cores to count words; SWE's is numpy on one core.",
        "command": "python benchmarks/swe.py",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 MB and 500 merges: to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/swe.json"))
    options = parser.parse_args()
    texts = python_files(2 if options.quick else 50)
    result = {
        "format": 1,
        "benchmark": "swe",
        "quick": options.quick,
        "target": "8,000 merges on 50 MB within 10 times the time of tokenizers' BPE trainer",
        "against_bpe": against_bpe(texts, 259 + (500 if options.quick else 8000), 1 if options.quick else 2),
        "against_rescan": against_rescan(texts[: 5 if options.quick else 40], 10 if options.quick else 60),
    }
    result |= {"machine": machine(), "versions": versions(), **page(result)}
    print(result["against_bpe"], result["against_rescan"], sep="\n")
    if not options.quick:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
