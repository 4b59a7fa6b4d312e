"""``modelwright doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

_EXTRAS = {
    "lz4": "compressors",
    "zstandard": "compressors",
    "brotli": "compressors",
    "scikit-learn": "curation",
    "sentence-transformers": "curation",
    "datatrove": "datatrove",
}


def doctor() -> None:
    """Check this machine: versions, accelerator, optional packages, disk, hub access."""
    import torch

    from modelwright.catalog import cards
    from modelwright.provenance import machine, versions

    write = sys.stdout.write
    found = machine()
    write(f"{found['processor']}, {found['cores']} cores, {found.get('memory_gib', '?')} GiB, {found['system']}\n")
    for name, version in versions().items():
        write(f"  {name:<22}{version}\n")
    write(f"Accelerator: {found.get('accelerator', 'none: everything runs on the CPU')}\n")
    if torch.cuda.is_available():
        write(f"  bfloat16: {'yes' if torch.cuda.is_bf16_supported() else 'no'}\n")
    write("Optional packages:\n")
    for package, extra in _EXTRAS.items():
        try:
            write(f"  {package:<22}{importlib.metadata.version(package)}\n")
        except importlib.metadata.PackageNotFoundError:
            write(f"  {package:<22}missing: pip install 'modelwright[{extra}]'\n")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    write(f"Disk: {free:.1f} GiB free here{' — little' if free < 2 else ''}\n")
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            write("  this folder can be written to\n")
    except OSError as error:
        write(f"  this folder cannot be written to: {error.strerror}\n")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    write(f"Hugging Face hub: {'offline (HF_HUB_OFFLINE is set)' if offline else 'online lookups allowed'}\n")
    write(f"Methods: {len(cards())} found\n")
