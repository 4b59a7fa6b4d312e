"""``modelwright doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.catalog import cards
from modelwright.progress import Progress
from modelwright.provenance import machine, versions

_EXTRAS = {
    "lz4": "compressors",
    "zstandard": "compressors",
    "brotli": "compressors",
    "scikit-learn": "curation",
    "sentence-transformers": "curation",
    "datatrove": "datatrove",
    "gensim": "word2vec",
    "kenlm": "kenlm",
    "lm-eval": "lm-eval",
    "numba": "speed",
    "peft": "training",
    "rapidfuzz": "probing",
    "scipy": "decoding",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(kw_only=True)
class Doctor:
    """Check this machine: versions, accelerator, optional packages, disk, hub access."""

    def run(self, progress: Progress) -> dict[str, Any]:
        """Returns what was found."""
        import torch  # so that `machine` sees the accelerator

        try:
            with tempfile.TemporaryFile(dir=Path.cwd()):
                writable = True
        except OSError:
            writable = False
        return {
            "machine": machine(),
            "bfloat16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            "versions": versions(),
            "optional": {package: _version(package) for package in _EXTRAS},
            "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
            "folder_writable": writable,
            "hub_offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
            "methods": len(cards()),
        }

    def show(self, found: dict[str, Any]) -> None:
        """Prints it."""
        write, hardware = sys.stdout.write, found["machine"]
        write(f"{hardware['processor']}, {hardware['cores']} cores, {hardware.get('memory_gib', '?')} GiB, ")
        write(f"{hardware['system']}\n")
        for name, version in found["versions"].items():
            write(f"  {name:<22}{version}\n")
        write(f"Accelerator: {hardware.get('accelerator', 'none: everything runs on the CPU')}\n")
        if "accelerator" in hardware:
            write(f"  bfloat16: {'yes' if found['bfloat16'] else 'no'}\n")
        write("Optional packages:\n")
        for package, version in found["optional"].items():
            text = version or f"missing: pip install 'modelwright[{_EXTRAS[package]}]'"
            write(f"  {package:<22}{text}\n")
        write(f"Disk: {found['disk_free_gib']} GiB free here{' — little' if found['disk_free_gib'] < 2 else ''}")
        write("\n" if found["folder_writable"] else "; this folder cannot be written to\n")
        offline = "offline (HF_HUB_OFFLINE is set)" if found["hub_offline"] else "online look-ups are allowed"
        write(f"Hugging Face hub: {offline}\nMethods: {found['methods']} found\n")
