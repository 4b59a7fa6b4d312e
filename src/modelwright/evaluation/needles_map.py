"""Heat maps of needle tests, length across and depth down: PNG or SVG by matplotlib, or a page of HTML by itself."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.errors import UserError

FORMATS = (".png", ".svg", ".html")
#: From nothing found to all found; dark to bright, so that it survives greyscale and colour blindness.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 2rem }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0 }}
th {{ font-weight: 400; padding: .2rem .6rem; text-align: right; color: #555 }}
td {{ padding: .5rem .8rem; text-align: center; min-width: 3rem; font-variant-numeric: tabular-nums }}
</style></head><body><h1>{title}</h1><p>{note}</p>
{tables}
</body></html>
"""


def write_map(
    path: Path, grids: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "Needles found", note: str = ""
) -> None:
    """Writes one map for each grid and task.

    Args:
        path: File to write; its suffix says the format: one of :data:`FORMATS`.
        grids: Name, such as ``STRING``, to its cells (see :func:`~modelwright.evaluation.needles.cells`).
        title: Heading.
        note: A sentence below it, such as how many trials a cell has.

    Raises:
        UserError: The suffix is unknown.
    """
    check_map(path)
    panels = [
        (name, task, [cell for cell in grid if cell["task"] == task])
        for name, grid in grids.items()
        for task in dict.fromkeys(cell["task"] for cell in grid)
    ]
    if path.suffix == ".html":
        tables = "\n".join(_table(f"{name}: {task}", grid) for name, task, grid in panels)
        path.write_text(_PAGE.format(title=html.escape(title), note=html.escape(note), tables=tables), encoding="utf-8")
    else:
        _figure(path, panels, title)


def check_map(path: Path) -> None:
    """Refuses a suffix that is no format.

    Raises:
        UserError: It is none.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path.name}: a heat map is written as {', '.join(FORMATS)}; choose one of these suffixes.")


def _axes(grid: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float | None]]:
    lengths = sorted({cell["length"] for cell in grid})
    depths = sorted({cell["depth"] for cell in grid}, key=lambda depth: -1.0 if depth is None else depth)
    return lengths, depths


def _depth(depth: float | None) -> str:
    return "" if depth is None else f"{depth:.0%}"


def colour(share: float) -> tuple[int, int, int]:
    """Returns the colour of a share between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    first = min(int(place), len(_COLOURS) - 2)
    low, high = _COLOURS[first], _COLOURS[first + 1]
    red, green, blue = (round(a + (place - first) * (b - a)) for a, b in zip(low, high))
    return red, green, blue


def _ink(share: float) -> str:
    red, green, blue = colour(share)
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#fff"


def _table(caption: str, grid: Sequence[Mapping[str, Any]]) -> str:
    lengths, depths = _axes(grid)
    values = {(cell["length"], cell["depth"]): cell["found"] for cell in grid}
    head = "".join(f"<th scope=col>{length:,}</th>" for length in lengths)
    lines = [f"<table><caption>{html.escape(caption)}</caption>", f"<tr><th>depth \\ tokens</th>{head}</tr>"]
    for depth in depths:
        shown = []
        for length in lengths:
            share = values.get((length, depth))
            style = "" if share is None else f' style="background: rgb{colour(share)}; color: {_ink(share)}"'
            shown.append(f"<td{style}>{'' if share is None else f'{share:.0%}'}</td>")
        lines.append(f"<tr><th scope=row>{_depth(depth)}</th>{''.join(shown)}</tr>")
    return "\n".join([*lines, "</table>"])


def _figure(path: Path, panels: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Made without pyplot, which keeps state and looks for a display.
    columns = max(1, len({name for name, _, _ in panels}))
    rows = -(-len(panels) // columns)
    widest = max((len(_axes(grid)[0]) for _, _, grid in panels), default=1)
    tallest = max((len(_axes(grid)[1]) for _, _, grid in panels), default=1)
    size = (columns * (1.6 + 0.75 * widest), 0.6 + rows * (1.1 + 0.42 * tallest))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (name, task, grid) in enumerate(panels):
        # Grids side by side, tasks below each other.
        of_name = [p for p in panels if p[0] == name]
        column = list(dict.fromkeys(p[0] for p in panels)).index(name)
        row = next(i for i, p in enumerate(of_name) if p[1] == task)
        axes = figure.add_subplot(rows, columns, row * columns + column + 1)
        lengths, depths = _axes(grid)
        values = {(cell["length"], cell["depth"]): cell["found"] for cell in grid}
        image = [[colour(values.get((n, d), 0.0)) for n in lengths] for d in depths]
        axes.imshow(image, aspect="auto")
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                if (length, depth) in values:
                    share = values[length, depth]
                    axes.text(j, i, f"{share:.0%}", ha="center", va="center", color=_ink(share), fontsize=9)
        axes.set_title(f"{name}: {task}", fontsize=10, loc="left")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axes.set_yticks(range(len(depths)), [_depth(d) for d in depths])
        axes.set_xlabel("tokens")
        if number == 0 or column == 0:
            axes.set_ylabel("depth")
    figure.savefig(path, format=path.suffix[1:], dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
