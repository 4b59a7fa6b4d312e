"""Writing results so that a crash never leaves half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelwright.errors import UserError


def check_output(path: str | Path, force: bool = False) -> Path:
    """Refuses to overwrite: call it before any work is done.

    Raises:
        UserError: The path exists and ``force`` is off, or its parent is not a folder.
    """
    path = Path(path)
    if path.exists() and not force:
        raise UserError(f"{path} exists already: choose another output, or give --force to replace it.")
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{path.parent} is a file, so {path.name} cannot be written in it: choose another output.")
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; it becomes ``path`` only if the block ends without an exception.

    The block may make a file or a folder there. On an exception, what it wrote is removed.

    Raises:
        UserError: ``path`` exists and ``force`` is off, or the disk is full or not writable.
    """
    path = check_output(path, force)
    # Named before it is made: Ctrl-C may come at any moment, also just after a folder came to be.
    scratch = path.parent / f".{path.name[:80]}.{secrets.token_hex(4)}.partial"
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir()
        except OSError as error:
            raise _disk_error(error, path) from error
        inside = scratch / path.name
        yield inside
        if not inside.exists():
            raise FileNotFoundError(f"nothing was written to {inside}")
        _replace(inside, path, scratch)
    except Exception as error:
        found = _os_error(error)
        if found is not None and found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise _disk_error(found, path) from error
        raise
    finally:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
        except BaseException as error:  # Ctrl-C in the middle of this
            shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, OSError):  # rmtree closes a file twice when it is cut at a bad moment
                raise KeyboardInterrupt from error
            raise


def _replace(new: Path, path: Path, scratch: Path) -> None:
    old = scratch / "replaced"
    try:
        # Nothing can be renamed over a folder that has files in it, nor a folder over a file: the old one steps
        # aside first and goes with the scratch folder.
        if (path.is_dir() and not path.is_symlink()) or (new.is_dir() and os.path.lexists(path)):
            path.rename(old)
        new.replace(path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise


def _os_error(error: Exception) -> OSError | None:
    if isinstance(error, OSError):
        return error
    # Libraries in Rust, safetensors and tokenizers, have errors of their own, which end like this.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _disk_error(error: OSError, path: Path) -> UserError:
    reason = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}.get(
        error.errno or 0, (error.strerror or str(error)).lower()
    )
    return UserError(f"{path} could not be written: {reason}. Nothing of it was left behind.")


def write_json(path: str | Path, value: Any, force: bool = True) -> None:
    """Writes JSON (UTF-8, indented, keys as given) atomically."""
    with atomic_path(path, force) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: It is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


def content_hash(path: str | Path) -> str:
    """Returns the SHA-256 (hex) of a file, or of a folder's relative names and bytes in sorted order."""
    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(
            os.fsencode(file.relative_to(path).as_posix()) + b"\0" + str(file.stat().st_size).encode() + b"\0"
        )
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
