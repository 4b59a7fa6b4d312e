"""How long `modelwright --help` and `list` take, as a ratio to a Python that does nothing.

    python benchmarks/command_line.py [--output results/benchmarks/command-line.json]

Target: at most 10 times `python -c pass`, and no torch. The floor is 1. Commands are interleaved; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from modelwright.files import write_json
from modelwright.provenance import machine, versions

TARGET = 10.0
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "modelwright --help": ["-m", "modelwright", "--help"],
    "modelwright list": ["-m", "modelwright", "list"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/command-line.json"))
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.repeats + 1):
        for name, words in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first fills the disk cache
    bare = medians["python -c pass"]
    rows = [
        {"command": name, "milliseconds": round(1e3 * value, 1), "÷ bare": round(value / bare, 2), "asked": TARGET}
        for name, value in medians.items()
    ]
    for row in rows:
        print(f"{row['command']:<22}{row['milliseconds']:8.1f} ms  {row['÷ bare']:6.2f} times a bare Python")
    title = "The command line's start"
    question = "How soon does it answer?"
    command = "python benchmarks/command_line.py"
    result = {"benchmark": "command-line", "title": title, "question": question, "rows": rows, "command": command}
    write_json(options.output, result | {"machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
