"""Turns exceptions into the exit codes and sentences that a user sees."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from modelwright.errors import MEMORY_IS_FULL, UserError, memory_is_full


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled wherever Ctrl-C is, so that a supervisor's stop is as gentle."""

    number = signal.SIGTERM


def _on_sigterm(signum: int, frame: Any) -> None:
    raise Terminated


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"modelwright: {message}\n")
    sys.stderr.flush()
    _end_if_distributed(code)
    raise SystemExit(code)


def _end_if_distributed(code: int) -> None:
    """Ends a process of a distributed run at once, without the interpreter's own end.

    Threads of the communication may still hold tensors, and one that drops its last while Python is being finalised
    aborts the process: the launcher would report a signal where there was a clear message.
    """
    distributed = sys.modules.get("torch.distributed")  # not to be imported for this
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1:
        sys.stdout.flush()
        os._exit(code)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a command: a user's mistake is one sentence and exit code 2, Ctrl-C is 130, SIGTERM 143."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _on_sigterm)
        try:
            return function(*args, **kwargs)
        except UserError as error:
            _fail(f"error: {error}", 2)
        except Terminated:
            _fail("stopped by SIGTERM. The same command continues where the work can be continued.", 143)
        except KeyboardInterrupt:
            _fail("interrupted. The same command continues where the work can be continued.", 130)
        except BrokenPipeError:
            # The reader (`| head`) has gone: not an error. Python would complain once more at exit without this.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                _fail(f"error: the disk is full{f' ({error.filename})' if error.filename else ''}: free some space.", 2)
            raise
        except RuntimeError as error:
            if memory_is_full(error):
                _fail(f"error: {MEMORY_IS_FULL}", 2)
            raise

    return wrapper
