"""Processes of their own for a test, forked: to import everything again would take most of the test's time."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

PATIENCE = 240.0  # seconds: only what hangs takes as long


def start(work: Callable[..., object], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Starts ``work(*arguments)``; the process prints an error that ends it, and has then exit code 1."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA, which this process uses, cannot be forked: run this test with CUDA_VISIBLE_DEVICES= before")
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def run(work: Callable[..., object], count: int, *arguments: Any) -> list[int | None]:
    """Runs ``work(rank, *arguments)`` in as many processes; returns their exit codes: None for one that hangs."""
    processes = [start(work, rank, *arguments) for rank in range(count)]
    try:
        for process in processes:
            process.join(PATIENCE)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def kill_when(sign: Callable[[], object], work: Callable[[], object]) -> None:
    """Runs ``work()`` in a process that is killed (SIGKILL) once ``sign()`` is true; fails if it ends before.

    What looks for the sign is a thread of that process: another process may, on a busy machine, get no turn until the
    work is done.
    """

    def watch() -> None:
        while True:
            with contextlib.suppress(OSError):  # a folder may go while it is looked through
                if sign():
                    break
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(rank: int) -> None:
        threading.Thread(target=watch, daemon=True).start()
        work()

    assert run(watched, 1) == [-signal.SIGKILL]


def gone(pids: Iterable[int], seconds: float = 60.0) -> bool:
    """Waits until no process has one of these numbers; returns whether that came to be."""
    deadline = time.monotonic() + seconds
    while any(map(_lives, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # one that nobody has asked for its exit code
    except psutil.NoSuchProcess:
        return False


def modelwright(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line; returns its exit code and what it wrote."""
    from modelwright.cli import main

    with tempfile.TemporaryDirectory() as folder:

        def command(rank: int) -> None:
            for name, number in (("stdout", 1), ("stderr", 2)):
                os.dup2(os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY), number)
                setattr(sys, name, os.fdopen(number, "w"))
            sys.argv = ["modelwright", *map(str, arguments)]
            code = 0
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        [code] = run(command, 1)
        written = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        assert code is not None, "it hangs"
        return subprocess.CompletedProcess(["modelwright", *map(str, arguments)], code, *written)
