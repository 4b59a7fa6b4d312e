"""What a staircase weighs: the formula, a table, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelwright.errors import UserError
from modelwright.files import atomic_path, check_output


@dataclass(frozen=True)
class Level:
    """What is held in a number of bits.

    Attributes:
        bits: 16 stands for what is not quantised, whatever its dtype.
        tokens: Of each sequence.
        bytes: Of all layers and sequences, scales and minima included.
        plain_bytes: What the same tokens take in a cache that does not quantise.
    """

    bits: int
    tokens: int
    bytes: int
    plain_bytes: int


def staircase_bytes(
    tokens: int,
    elements: int,
    levels: Sequence[int] = (16, 8, 4, 2),
    segment_length: int = 128,
    group_size: int = 32,
    *,
    element_bytes: int = 2,
    metadata_bytes: int = 2,
) -> list[Level]:
    """Returns what a cache of some tokens holds in each number of bits, by the formula.

    Of ``T`` tokens, ``T mod S`` are not quantised; of the segments before, the i-th most recent has level
    ``min(i, q - 1)``. Each group of G numbers has a scale and a minimum: ``2 * 16 / G`` bits a number more.

    Args:
        tokens: T.
        elements: Numbers of one token: 2 (key and value) times layers, key heads and size of a head, times sequences.
        levels: Bits by age.
        segment_length: S.
        group_size: G.
        element_bytes: Of a number that is not quantised.
        metadata_bytes: Of a scale, and of a minimum.
    """
    whole, rest = divmod(tokens, segment_length) if len(levels) > 1 else (0, tokens)
    found = [Level(16, rest, rest * elements * element_bytes, rest * elements * element_bytes)]
    for age, bits in enumerate(levels[1:], start=1):
        last = age == len(levels) - 1
        number = (max(0, whole - age + 1) if last else int(whole >= age)) * segment_length
        if number:
            size = number * elements * bits // 8 + number * elements // group_size * 2 * metadata_bytes
            found.append(Level(bits, number, size, number * elements * element_bytes))
    return found


def memory_table(levels: Sequence[Level]) -> str:
    """Returns a line for each level and one for the sum, for reading."""
    total = Level(0, *(sum(getattr(level, n) for level in levels) for n in ("tokens", "bytes", "plain_bytes")))
    rows = [("bits", "tokens", "memory", "plain cache")]
    for level in (*levels, total):
        rows.append((str(level.bits or "all"), f"{level.tokens:,}", size(level.bytes), size(level.plain_bytes)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def size(number: float) -> str:
    """Returns bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"


def check_plot(path: Path, force: bool = False) -> None:
    """Refuses a file that :func:`plot_memory` would not write.

    Raises:
        UserError: It exists, or its name says no kind of plot.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"{path} must end in .svg, .png or .pdf, which says what is drawn.")
    check_output(path, force)


def plot_memory(levels: Sequence[Level], path: str | Path, *, force: bool = False) -> Path:
    """Draws memory by level as bars, beside what a plain cache would take.

    Args:
        levels: From :meth:`~modelwright.attention.saq.StaircaseQuantizedCache.memory_by_level` or
            :func:`staircase_bytes`.
        path: A file that ends in .svg, .png or .pdf.
        force: Whether to replace the file.

    Raises:
        UserError: The file exists, or ends otherwise.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    check_plot(path, force)
    rows = [("as it came" if level.bits == 16 else f"{level.bits} bits", level.tokens, level.bytes) for level in levels]
    rows.append(("plain cache", sum(level.tokens for level in levels), sum(level.plain_bytes for level in levels)))
    figure = Figure(figsize=(7, 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(rows)), [row[2] / 2**20 for row in rows], color="#0072b2", height=0.62)
    for i, (_, tokens, number) in enumerate(rows):
        note = f"{size(number)}, {tokens:,} tokens"
        axes.annotate(note, (number / 2**20, i), xytext=(5, 0), textcoords="offset points", va="center", size=9)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(row[2] for row in rows) / 2**20 * 1.4 or 1)
    axes.set_xlabel("memory (MiB)")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path, force=force) as new:
        figure.savefig(new, format=path.suffix[1:])
    return path
