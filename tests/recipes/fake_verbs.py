"""Small verbs for the tests of recipes. Workers import this module through PYTHONPATH."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.errors import UserError
from modelwright.files import atomic_path, check_output
from modelwright.verbs.base import Arg

VERBS = {
    "number": "fake_verbs:Number",
    "add": "fake_verbs:Add",
    "read": "fake_verbs:Read",
    "slow": "fake_verbs:Slow",
    "trouble": "fake_verbs:Trouble",
    "parent": "fake_verbs:Parent",
}


def _note(name: str) -> None:
    # Each real execution leaves a line, so that tests can count them.
    if log := os.environ.get("FAKE_LOG"):
        with Path(log).open("a") as stream:
            stream.write(name + "\n")


@dataclass(kw_only=True)
class Number:
    """Writes a number."""

    value: Annotated[int, Arg("The number.")]
    scale: Annotated[float, Arg("A factor.")] = 1.0
    mode: Annotated[Literal["plain", "negative"], Arg("How.")] = "plain"
    options: Annotated[dict[str, Any], Arg("More.")] = field(default_factory=dict)
    speed: Annotated[int, Arg("Does not change the result.", kind="run")] = 1
    output: Annotated[Path, Arg("Output.", kind="output", filename="number.json")]
    force: Annotated[bool, Arg("Replace.", kind="run")] = False

    def run(self, progress: Any) -> dict[str, Any]:
        _note(f"number {self.value}")
        check_output(self.output, self.force)
        value = self.value * self.scale * (-1 if self.mode == "negative" else 1)
        with atomic_path(self.output) as partial:
            partial.write_text(json.dumps(value))
        return {"value": value, "path": self.output, "deep": {"list": [1, 2, value]}, "nan": float("nan")}


@dataclass(kw_only=True)
class Add:
    """Adds numbers that are in files."""

    numbers: Annotated[list[Path], Arg("Files.", kind="input")]
    plus: Annotated[float, Arg("More to add.")] = 0.0
    output: Annotated[Path, Arg("Output.", kind="output", filename="sum.json")]

    def run(self, progress: Any) -> dict[str, Any]:
        _note(f"add {len(self.numbers)}")
        check_output(self.output)
        progress.start("adding", len(self.numbers))
        total = self.plus
        for path in self.numbers:
            total += json.loads(path.read_text())
            progress.advance()
        with atomic_path(self.output) as partial:
            partial.write_text(json.dumps(total))
        return {"sum": total, "files": len(self.numbers)}


@dataclass(kw_only=True)
class Read:
    """Reads a file."""

    file: Annotated[Path, Arg("File.", kind="input")]
    tag: Annotated[str, Arg("Text.")] = ""
    output: Annotated[Path, Arg("Output.", kind="output", filename="copy.txt")]

    def run(self, progress: Any) -> dict[str, Any]:
        _note("read")
        with atomic_path(check_output(self.output)) as partial:
            partial.write_text(self.file.read_text())
        return {"length": len(self.file.read_text())}


@dataclass(kw_only=True)
class Slow:
    """Counts with a working file beside its output, from which it goes on."""

    steps: Annotated[int, Arg("Steps.")] = 20
    seconds: Annotated[float, Arg("Seconds a step.", kind="run")] = 0.05
    seed: Annotated[int, Arg("Seed.")] = 0
    output: Annotated[Path, Arg("Output.", kind="output", filename="count")]

    def run(self, progress: Any) -> dict[str, Any]:
        check_output(self.output)
        working = self.output.with_name("count.working")
        done = json.loads(working.read_text()) if working.exists() else {"step": 0, "sum": self.seed}
        _note(f"slow {self.seed} from {'the middle' if done['step'] else 'the start'}")
        progress.start("counting", self.steps)
        with atomic_path(self.output) as partial:
            partial.mkdir()
            while done["step"] < self.steps:
                time.sleep(self.seconds)
                done = {"step": done["step"] + 1, "sum": done["sum"] * 3 + done["step"]}
                with atomic_path(working, force=True) as scratch:
                    scratch.write_text(json.dumps(done))
                progress.advance(note=f"sum {done['sum']}")
            (partial / "sum.json").write_text(json.dumps(done))
        working.unlink()
        return done


@dataclass(kw_only=True)
class Trouble:
    """Fails in a chosen way."""

    how: Annotated[str, Arg("How.")]
    output: Annotated[Path, Arg("Output.", kind="output", filename="x")]

    def run(self, progress: Any) -> dict[str, Any]:
        if self.how == "user":
            raise UserError("pool.jsonl:3: this line is not JSON.")
        if self.how == "disk":
            raise OSError(28, "No space left on device", str(self.output))
        if self.how == "memory":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.how == "kill":
            print("some words of a library")
            with atomic_path(self.output):
                os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit":
            os._exit(7)
        if self.how == "unjsonable":
            return {"x": object()}
        raise ZeroDivisionError("a defect")


@dataclass(kw_only=True)
class Parent:
    """Starts a process of its own and waits for it."""

    output: Annotated[Path, Arg("Output.", kind="output", filename="x")]

    def run(self, progress: Any) -> dict[str, Any]:
        child = subprocess.Popen(["sleep", "60"])
        with atomic_path(self.output.with_name("child.txt")) as partial:
            partial.write_text(str(child.pid))
        child.wait()
        return {}
