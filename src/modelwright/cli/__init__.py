"""The command line: ``modelwright VERB``. Imports nothing heavy, so that ``--help`` and ``list`` answer at once."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 a defect of ours, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    sys.unraisablehook = _dropped
    try:
        _main()
    except KeyboardInterrupt:  # before the command's own guard stood
        raise SystemExit(130) from None


def _dropped(fault: Any) -> None:
    """Python drops what is raised in a finaliser or a callback of its import system: Ctrl-C there is sent again."""
    if not issubclass(fault.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(fault)
        return
    import threading
    import time

    number, main_thread = getattr(fault.exc_type, "number", signal.SIGINT), threading.get_ident()

    def again() -> None:
        # Raised in here it would be dropped again. Nothing lets go of the interpreter between the look and the kill.
        while _is_within(sys._current_frames().get(main_thread)):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=again, daemon=True).start()


def _is_within(frame: Any) -> bool:
    while frame is not None and frame.f_code is not _dropped.__code__:
        frame = frame.f_back
    return frame is not None


def _main() -> None:
    arguments = sys.argv[1:]
    if arguments in (["--version"], ["-V"]):
        from modelwright import __version__

        sys.stdout.write(f"modelwright {__version__}\n")
    elif arguments == ["list"]:
        # Asked most often, and parsing options costs three times as much as the answer.
        from modelwright.cli.guard import guarded
        from modelwright.cli.list_methods import ListMethods
        from modelwright.progress import Silent

        methods = ListMethods()
        guarded(lambda: methods.show(methods.run(Silent())))()
    else:
        from modelwright.cli.app import run_command_line

        run_command_line()
