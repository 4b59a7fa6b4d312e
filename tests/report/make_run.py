"""Builds a run folder as the recipe runner leaves it, with made-up but realistic numbers.

By hand: ``python tests/report/make_run.py FOLDER`` makes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

METHODS = {"zip-fit": 0.74, "dsir": 0.69, "tf-idf": 0.58, "random": 0.14, "oracle": 1.0}
ARCHITECTURES = {
    "llama": 0.0,
    "resformer-half": -0.055,
    "resformer-2-1": -0.130,
    "scaled-values": 0.045,
}
KINDS = ("reference", "docstring", "code", "tests")
LABELS = {
    "zip-fit": "ZIP-FIT",
    "dsir": "DSIR",
    "tf-idf": "TF-IDF",
    "random": "random text",
    "oracle": "oracle (knows the kind)",
    "llama": "Llama",
    "resformer-half": "ResFormer (½, ½)",
    "resformer-2-1": "ResFormer (2, 1)",
    "scaled-values": "Llama, values scaled",
    "reference": "language reference",
}
TEXTS = {
    "reference": "The 'with' statement\n********************\n\nThe 'with' statement is used to wrap the execution of "
    "a block with methods defined by a context manager. This allows common 'try'...'except'...'finally' usage patterns "
    "to be encapsulated for convenient reuse.\n\n"
    "   with_stmt ::= 'with' ( '(' with_stmt_contents ','? ')' | contents ) ':' suite\n",
    "docstring": "Return a list of the words in the string, using sep as the delimiter string.\n\nIf maxsplit is "
    "given, at most maxsplit splits are done (thus, the list will have at most maxsplit+1 elements). If maxsplit is "
    "not given, or -1, then there is no limit on the number of splits (all possible splits are made).\n",
    "code": "def _parse_args(self, args):\n    if not args:\n        return ()\n    for i, arg in enumerate(args):\n"
    "        if isinstance(arg, str) and arg.startswith('--'):\n            yield i, arg[2:].partition('=')[::2]\n" * 2,
    "tests": "    def test_empty(self):\n        self.assertEqual(list(self.parse('')), [])\n        "
    "with self.assertRaises(ValueError):\n            self.parse('x' * 10)\n",
}
REPORT = {
    "question": "Does choosing training data by compression give a better model than chance, "
    "and does a value residual help?",
    "labels": LABELS,
    "compare": [
        {
            "title": "Held-out bits per byte",
            "metric": "evaluate.result.bits_per_byte",
            "rows": "method",
            "columns": "architecture",
            "over": "seed",
            "better": "lower",
            "unit": "bits per byte",
            "given": "At equal tokens",
            "baseline": {"method": "random", "architecture": "llama"},
            "references": ["oracle", "scaled-values"],
        }
    ],
    "curves": [
        {
            "title": "Training loss",
            "step": "train",
            "x": "tokens",
            "y": "loss",
            "unit": "nats per token",
            "lines": ["method", "architecture"],
            "over": "seed",
        }
    ],
    "selections": {"step": "select", "rows": "method", "over": "seed", "group": "kind", "target": "reference"},
    "samples": {"step": "write"},
}
RECIPE = """\
name: quickstart
title: Better data or a better architecture?
steps:
  world: {uses: world, with: {kind: stdlib-text}}
  select:
    matrix: {method: [zip-fit, dsir, tf-idf, random, oracle], seed: [0, 1, 2]}   # at equal tokens
    uses: select
  train: {uses: train, matrix: {architecture: [llama, resformer-2-1]}}
"""


def make_run(
    folder: Path,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    report: dict | None = None,
    effect: float = 1.0,
    noise: float = 0.012,
    methods: dict[str, float] = METHODS,
    architectures: dict[str, float] = ARCHITECTURES,
    title: str = "Better data or a better architecture?",
    texts: dict[str, str] = TEXTS,
    finished: bool = True,
) -> Path:
    """Writes ``run.json``, ``result.json`` files, chosen rows, logs and generated text, and returns the folder.

    Args:
        folder: Where.
        seeds: Repetitions.
        report: The report block; None takes :data:`REPORT`.
        effect: Factor on all true differences; 0 means that nothing differs.
        noise: Standard deviation of the noise that differs between cells.
        methods: Method to precision.
        architectures: Architecture to its effect.
        title: The recipe's title.
        texts: Kind to document.
        finished: When false, the last seed's training and evaluation have no result.
    """
    rng, steps = random.Random(0), []

    def step(name, verb, at, result, seconds, done=True):
        identity = "-".join([name, *(str(v) for v in at.values())])
        place = folder / "steps" / identity
        place.mkdir(parents=True, exist_ok=True)
        entry = {"id": identity, "step": name, "verb": verb, "at": at, "options": {}, "folder": f"steps/{identity}"}
        entry |= {"seconds": seconds, "cached": name == "world"}
        if done:
            (place / "result.json").write_text(json.dumps(result))
            entry["result"] = result
        steps.append(entry)
        return place

    step("world", "world", {}, {"pool": 3000, "target": 40, "heldout": 160}, 2.4)
    for seed in seeds:
        for method, precision in methods.items():
            counts, rows = _choose(rng, method, precision, texts)
            result = {
                "method": method,
                "documents": len(rows),
                "pool_documents": 3000,
                "tokens": 61000 + rng.randrange(900),
                "seconds": 0.4 + rng.random() * 3,
                "length_correlation": {
                    "spearman": None if method in ("random", "oracle") else -0.6 + rng.random() * 0.4
                },
                "bytes_per_document": {"pool": 830.0, "chosen": 700 + rng.random() * 100},
                "contamination": {"contaminated_documents": rng.randrange(3)},
                "precision": counts["reference"] / len(rows),
                "recall": counts["reference"] / 310,
                "groups": counts,
                "pool_groups": {"reference": 310, "docstring": 900, "code": 1000, "tests": 790},
            }
            place = step("select", "select", {"method": method, "seed": seed}, result, result["seconds"])
            _write(place / "chosen.jsonl", rows)
    for seed in seeds:
        common = rng.gauss(0, 0.02)
        for method, precision in methods.items():
            for architecture, shift in architectures.items():
                level = 2.58 + common + effect * (shift - 0.36 * (precision - 0.14) / 0.86) + rng.gauss(0, noise)
                at, done = {"method": method, "architecture": architecture, "seed": seed}, finished or seed != seeds[-1]
                result = {"steps": 300, "tokens": 153600, "tokens_per_second": 11000.0, "final_loss": level * 1.2}
                place = step("train", "train", at, result, 12.5 + rng.random() * 3, done)
                if done:
                    (place / "model").mkdir(exist_ok=True)
                    _write(place / "model" / "training_log.jsonl", _log(rng, level))
                result = {"bits_per_byte": level, "documents": 160, "bytes": 134000, "tokens": 41000}
                step("evaluate", "evaluate perplexity", at, result, 0.9, done)
    best = {"method": "zip-fit", "architecture": "resformer-2-1"}
    place = step("write", "generate", best, {"texts": 2}, 1.7)
    _write(
        place / "completions.jsonl",
        [
            {
                "prompt": "The 'while' statement",
                "completion": " is used for the object is the value of the 'class' of a name.",
            },
            {
                "prompt": "A function definition",
                "completion": " defines the following the argument, the expression list is.",
            },
        ],
    )
    run = {
        "format": 1,
        "name": "quickstart",
        "title": title,
        "status": "done" if finished else "interrupted",
        "planned": len(steps),
        "recipe": {"name": "quickstart"},
        "recipe_text": RECIPE,
        "started": "2025-11-21T08:04:00+00:00",
        "seconds": 241.3,
        "machine": {"processor": "AMD EPYC", "cores": 2, "system": "Linux", "memory_gib": 15.6},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "modelwright": "0.1.0"},
        "report": REPORT if report is None else report,
        "steps": steps,
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def _choose(rng, method, precision, texts):
    rows, counts = [], dict.fromkeys(KINDS, 0)
    for _ in range(300):
        kind = "reference" if rng.random() < precision else rng.choice(KINDS[1:])
        counts[kind] += 1
        score = (0.42 if kind == "reference" else 0.34) + rng.gauss(0, 0.025)
        text = texts[kind] * rng.randint(1, 3)
        rows.append({"text": text, "kind": kind, "name": f"doc-{len(rows)}", "score": score})
    if method in ("random", "oracle"):
        for row in rows:
            row["score"] = None
    rows.sort(key=lambda r: -(r["score"] or 0))
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank
    return counts, rows


def _log(rng, level):
    return [
        {
            "step": step,
            "tokens": step * 512,
            "loss": level * 1.2 + 4.5 * math.exp(-step / 45) + rng.gauss(0, 0.03),
            "learning_rate": 3e-3,
        }
        for step in range(10, 301, 10)
    ]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    make_run(target)
