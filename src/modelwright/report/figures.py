"""Plots as inline SVG: drawn by matplotlib, coloured by the page's CSS, with text left as text."""

from __future__ import annotations

import functools
import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Colours of the page, ``--c1`` to ``--c8`` (Okabe and Ito's, which colour-blind readers can tell apart).
PALETTE_SIZE = 8
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = "osD^vPX*"
# Stand-ins that no plot would use by itself; they become CSS variables in the finished SVG.
_INK, _FAINT, _PAPER = "#010203", "#010204", "#010205"
_SERIES = tuple(f"#0102{16 + i:02x}" for i in range(PALETTE_SIZE))
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--rule)", _PAPER: "var(--paper)"} | {
    colour: f"var(--c{i + 1})" for i, colour in enumerate(_SERIES)
}


# What XML cannot hold, and what would break a tick label: a document's kind or name may be anything.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_LABEL_LENGTH = 40


def printable(text: str) -> str:
    """Replaces control characters and lone surrogates by the replacement character."""
    return _UNPRINTABLE.sub("\ufffd", text)


def _ticks(labels: Sequence[str]) -> list[str]:
    flat = [" ".join(printable(label).split()) for label in labels]
    return [label if len(label) <= _LABEL_LENGTH else label[: _LABEL_LENGTH - 1] + "…" for label in flat]


def colour(index: int) -> str:
    """Returns the stand-in of the i-th series colour."""
    return _SERIES[index % PALETTE_SIZE]


@functools.cache
def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a user's "$" is a dollar
        "font.size": 10,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "axes.titlecolor": _INK,
        "text.color": _INK,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _FAINT,
        "grid.linewidth": 0.6,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.unicode_minus": True,
    }


def draw(name: str, alt: str, size: tuple[float, float], paint: Callable[[Any], None]) -> str:
    """Draws one plot and returns it as an ``<svg>`` element for inlining in HTML.

    Args:
        name: Prefix of the ids inside, unique on the page; letters, digits and hyphens.
        alt: What a reader who does not see the plot is told.
        size: Width and height in CSS pixels at full size.
        paint: Called with the matplotlib axes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The figure is made without pyplot, which would keep state and look for a display.
    style: Any = {**_style(), "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size[0] / 96, size[1] / 96), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The reader's fonts draw the text; that matplotlib's own lacks a sign only makes its width a guess.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, printable(alt), size)


def _inline(svg: str, name: str, alt: str, size: tuple[float, float]) -> str:
    """Strips what inline SVG does not need, makes ids unique and hands colours over to the page."""
    root = ElementTree.fromstring(svg)
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            if "}" in key:
                element.set(key.rpartition("}")[2], element.attrib.pop(key))
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag == "metadata"]:
            parent.remove(child)
    used = {
        v.split("#", 1)[1].rstrip(")") for e in root.iter() for v in e.attrib.values() if v.startswith(("#", "url(#"))
    }
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
        for key, value in element.attrib.items():
            if key == "href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{name}-{value[5:]}")
            elif key == "style" and element.tag == "text":
                # matplotlib names the fonts of the machine that drew it; the page knows better.
                kept = [p for p in value.split(";") if not p.strip().startswith("font")]
                size_px = next((w for w in value.replace(":", " ").split() if w.endswith("px")), "10px")
                element.set(key, ";".join([f"font-size: {size_px}", *kept]))
    view = root.get("viewBox", "0 0 1 1")
    root.attrib.clear()
    root.attrib |= {
        "viewBox": view,
        "role": "img",
        "aria-labelledby": f"{name}-alt",
        "class": "plot",
        "style": f"--width: {size[0]:.0f}px",
    }
    title = ElementTree.Element("title", {"id": f"{name}-alt"})
    title.text = alt
    root.insert(0, title)
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text


@dataclass(frozen=True)
class Line:
    """A curve with the range of its repetitions.

    Attributes:
        label: What it is.
        x: Positions.
        y: Means.
        low: Smallest of the repetitions.
        high: Largest of them.
        series: Number of its colour, dash and marker.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    series: int


def curves(
    name: str,
    alt: str,
    lines: Sequence[Line],
    x: str,
    y: str,
    limits: tuple[float, float] | None,
    *,
    powers: bool = False,
) -> str:
    """Returns lines with bands. ``limits``: shared range of y for panels side by side. ``powers``: tens of y."""

    def paint(axes: Any) -> None:
        for line in lines:
            axes.fill_between(line.x, line.low, line.high, color=colour(line.series), alpha=0.18, linewidth=0)
            axes.plot(
                line.x,
                line.y,
                color=colour(line.series),
                linestyle=_DASHES[(line.series + line.series // PALETTE_SIZE) % len(_DASHES)],
                linewidth=1.8,
                marker=_MARKERS[line.series % len(_MARKERS)],
                # The second time round, marks are hollow: as in the legend.
                markerfacecolor=_PAPER if line.series // PALETTE_SIZE % 2 else colour(line.series),
                markersize=4.5,
                markevery=(max(1, len(line.x) // 6) // 2, max(1, len(line.x) // 6)),
            )
        axes.set_xlabel(printable(x))
        axes.set_ylabel(printable(y))
        axes.xaxis.set_major_formatter(_thousands())
        # No quarter of a step, of a token or of a block.
        whole = all(float(value).is_integer() for line in lines for value in line.x)
        axes.locator_params(axis="x", nbins=5, integer=whole)
        if limits:
            axes.set_ylim(*limits)
        if powers:
            from matplotlib.ticker import SymmetricalLogLocator

            axes.set_yscale("symlog", linthresh=1.0)
            locator = SymmetricalLogLocator(base=10, linthresh=1.0)
            locator.set_params(numticks=6)
            axes.yaxis.set_major_locator(locator)
            axes.yaxis.set_major_formatter(_thousands())

    return draw(name, alt, (430, 300), paint)


def _thousands() -> Any:
    from matplotlib.ticker import FuncFormatter

    def write(value: float, _: int) -> str:
        for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{suffix}"
        return f"{value:g}".replace("-", "−")

    return FuncFormatter(write)


@dataclass(frozen=True)
class Dots:
    """The repetitions of one cell, their mean and spread. ``place`` is the cell's position within its row."""

    row: int
    place: int
    series: int
    values: Sequence[float]
    mean: float
    sd: float | None


def dots(name: str, alt: str, rows: Sequence[str], cells: Sequence[Dots], columns: int, x: str) -> str:
    """Returns every repetition as a faint dot, with mean and one standard deviation, a row each."""

    def paint(axes: Any) -> None:
        spread = 0.62 / max(columns, 1)
        for cell in cells:
            place = cell.row + (cell.place - (columns - 1) / 2) * spread
            paint_colour, marker = colour(cell.series), _MARKERS[cell.series % len(_MARKERS)]
            # A little below the bar, which would hide them.
            below = [place + 0.36 * spread] * len(cell.values)
            axes.plot(cell.values, below, "o", color=paint_colour, alpha=0.55, markersize=3, mew=0)
            axes.errorbar(
                [cell.mean], [place], xerr=None if cell.sd is None else [cell.sd], fmt=marker, color=paint_colour,
                markersize=6.5, elinewidth=1.8,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), _ticks(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(printable(x))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.06)

    return draw(name, alt, (760, 70 + len(rows) * max(30, 17 * columns)), paint)


def stacked(name: str, alt: str, rows: Sequence[str], parts: Sequence[tuple[int, Sequence[float]]], x: str) -> str:
    """Returns horizontal bars of shares in percent. ``parts``: (series, share of each row)."""

    def paint(axes: Any) -> None:
        left = [0.0] * len(rows)
        for series, shares in parts:
            axes.barh(
                range(len(rows)), shares, left=left, color=colour(series), edgecolor=_PAPER, linewidth=1, height=0.68
            )
            for i, share in enumerate(shares):
                if share >= 7:
                    axes.text(left[i] + share / 2, i, f"{share:.0f}%", ha="center", va="center", color=_PAPER, size=9)
            left = [a + b for a, b in zip(left, shares)]
        axes.set_yticks(range(len(rows)), _ticks(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel(printable(x))
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return draw(name, alt, (760, 60 + 30 * len(rows)), paint)


def bars(name: str, alt: str, rows: Sequence[str], values: Sequence[float], notes: Sequence[str], x: str) -> str:
    """Returns horizontal bars with a note at the end of each."""

    def paint(axes: Any) -> None:
        axes.barh(range(len(rows)), values, color=colour(0), height=0.62)
        for i, (value, note) in enumerate(zip(values, notes)):
            axes.annotate(printable(note), (value, i), xytext=(5, 0), textcoords="offset points", va="center", size=9)
        axes.set_yticks(range(len(rows)), _ticks(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, max([*values, 1e-9]) * 1.3)
        axes.set_xlabel(printable(x))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    return draw(name, alt, (760, 60 + 28 * len(rows)), paint)


def histogram(name: str, alt: str, scores: Mapping[int, Sequence[float]], x: str) -> str:
    """Returns stacked counts of scores. ``scores``: series to its scores."""

    def paint(axes: Any) -> None:
        lists = [list(v) for v in scores.values()]
        axes.hist(lists, bins=24, stacked=True, color=[colour(s) for s in scores], edgecolor=_PAPER, linewidth=0.4)
        axes.set_xlabel(printable(x))
        axes.set_ylabel("documents")
        axes.grid(axis="x", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.yaxis.get_major_locator().set_params(integer=True)

    return draw(name, alt, (320, 210), paint)
