"""The one exception that means: the user can mend this."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """Bad input, in one sentence: what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class DivergedError(UserError):
    """Numbers that are not finite came out: of bad options, or of a model that is ruined already."""


#: What is said where nobody nearer to the work has said more.
MEMORY_IS_FULL = (
    "the accelerator's memory is full: use a smaller batch size, shorter texts, bfloat16, or --device cpu. What was "
    "kept of an unfinished run stays."
)


def memory_is_full(error: BaseException) -> bool:
    """Returns whether an error means that the accelerator's memory is full."""
    torch = sys.modules.get("torch")  # not to be imported for this
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the tail of an error message: the nearest known names, or up to 40 of all when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    more = f" and {len(known) - 40:,} more" if len(known) > 40 else ""
    return f"known: {', '.join(known[:40]) or 'none'}{more}."


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional package, or says how to install it.

    Args:
        module: Import name, such as ``"lz4.frame"``.
        extra: The extra of this package that brings it, such as ``"compressors"``.
        purpose: What it is needed for, as it reads after "is needed for".

    Raises:
        UserError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(
            f"The package '{package}' is needed for {purpose}: install it with: pip install 'modelwright[{extra}]'."
        ) from error
