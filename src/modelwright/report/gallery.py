"""Pictures with their captions, from a Parquet file that a step wrote: what was chosen, or what a world holds."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.errors import UserError
from modelwright.report.runs import Run
from modelwright.report.spec import Gallery

#: Pixels beyond which a picture is made smaller: the page holds every one of them.
_LARGEST = 112
_TEXT = 200


@dataclass(frozen=True)
class Picture:
    """A picture as shown.

    Attributes:
        source: A ``data:`` address of a PNG file that was encoded here, or an empty string for a picture that cannot
            be read.
        text: Its caption.
        group: Its kind.
        score: Its score, if it has one.
        wanted: Whether its kind is wanted; None where the recipe does not say.
    """

    source: str
    text: str
    group: str
    score: float | None
    wanted: bool | None


def galleries(run: Run, spec: Gallery, labels: dict[str, str]) -> dict[str, Any]:
    """Returns strips of pictures: the first and the last of each method where rows have a rank, else some of each kind.

    Of repetitions, the first is shown.

    Raises:
        UserError: No step of that name has finished, or none wrote the file with pictures and captions.
    """
    steps = run.named(spec.step)
    if not steps:
        raise UserError(f"No step '{spec.step}' has finished, so there are no pictures to show yet.")
    strips, seen = [], set()
    for step in steps:
        value, path = str(step.at.get(spec.rows, "")) if spec.rows else "", step.find(spec.file)
        if value not in seen and path is not None:
            seen.add(value)
            strips += _strips(path, spec, labels.get(value, value), labels)
    if not seen:
        raise UserError(f"'{spec.title}': no finished '{spec.step}' step wrote {spec.file}.")
    return {"title": spec.title, "strips": strips}


def _strips(path: Path, spec: Gallery, method: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if missing := [name for name in (spec.image, spec.text) if name not in names]:
            raise UserError(f"'{spec.title}': {path.name} has no column '{missing[0]}': name it under image or text.")
        # The pictures are most of the file, so which of them to show is settled without reading them.
        plain = file.read(columns=[n for n in (spec.group, spec.rank) if n in names]).to_pydict()
        wanted = _chosen(plain, file.metadata.num_rows, spec, method, labels)
        rows = _rows(file, sorted({i for _, places in wanted for i in places}), names, spec)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{spec.title}': {path.name} cannot be read: {str(error).splitlines()[0]}") from error
    return [
        # A strip of one kind says so in its heading.
        {"label": label, "pictures": [_picture(rows[i], spec, labels, spec.rank in plain) for i in places]}
        for label, places in wanted
        if places
    ]


def _chosen(
    plain: dict[str, list[Any]], n: int, spec: Gallery, method: str, labels: dict[str, str]
) -> list[tuple[str, list[int]]]:
    """Returns each strip's heading and its rows' numbers."""
    if spec.rank in plain:
        ranks = plain[spec.rank]
        order = sorted((i for i in range(n) if ranks[i] is not None), key=lambda i: (ranks[i], i))
        first, last = order[: spec.pictures], order[spec.pictures :][-spec.pictures :]
        name = method or "What was chosen"
        return [(f"{name}: the first", first), (f"{name}: the last", last)]
    groups = [str(group) for group in plain.get(spec.group, [""] * n)]
    found = []
    for group in dict.fromkeys(groups):
        heading = ": ".join(part for part in (method, labels.get(group, group)) if part)
        found.append((heading, [i for i, other in enumerate(groups) if other == group][: spec.pictures]))
    return found


def _rows(file: Any, places: Sequence[int], names: Sequence[str], spec: Gallery) -> dict[int, dict[str, Any]]:
    """Reads only the row groups that hold the wanted rows."""
    columns = [name for name in (spec.image, spec.text, spec.group, spec.score) if name in names]
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for number in range(file.metadata.num_row_groups):
        end = start + file.metadata.row_group(number).num_rows
        here = [i for i in places if start <= i < end]
        if here:
            taken = file.read_row_group(number, columns=columns).take([i - start for i in here]).to_pylist()
            found.update(zip(here, taken))
        start = end
    return found


def _picture(row: dict[str, Any], spec: Gallery, labels: dict[str, str], name_group: bool) -> Picture:
    group, score = row.get(spec.group), row.get(spec.score)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        score = None
    text = str(row[spec.text])
    return Picture(
        source=_source(row[spec.image]),
        text=text if len(text) <= _TEXT else text[: _TEXT - 1] + "…",
        group="" if group is None or not name_group else labels.get(str(group), str(group)),
        score=score,
        wanted=str(group) in spec.target if spec.target and group is not None else None,
    )


def _source(value: Any) -> str:
    """Decodes a picture and encodes it again, so that only pixels reach the page."""
    from PIL import Image

    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        return ""
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    picture.thumbnail((_LARGEST, _LARGEST))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
