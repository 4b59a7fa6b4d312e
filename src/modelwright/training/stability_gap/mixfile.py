"""The file that names the general sources and their shares of the original pre-training mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.errors import UserError, did_you_mean
from modelwright.values import Loader


@dataclass(frozen=True)
class General:
    """A general source.

    Attributes:
        name: Its name.
        rate: Its share of the original mixture.
        data: Files, folders, patterns or hub ids; empty for one that the domain replaces.
        text_field: Field of the text.
    """

    name: str
    rate: float
    data: tuple[str, ...]
    text_field: str = "text"


def read_mixture(path: str | Path, replace: Sequence[str] = ()) -> tuple[list[General], float]:
    """Reads the mixture, and gives the domain the shares of the sources that it replaces.

    The file is YAML or JSON: source to ``rate`` and ``data`` (a path or a list of them, relative to the file) and,
    where it is not ``text``, ``text_field``. A replaced source needs no data.

    Args:
        path: The file.
        replace: Sources whose share becomes the domain's, as the web's does in the paper; all without data if empty.

    Returns:
        The sources that stay, and the domain's share.

    Raises:
        UserError: The file is missing or malformed, rates do not sum to 1, a source to replace is unknown, or one that
            stays has no data.
    """
    import yaml

    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the YAML file of the mixture.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from error
    if isinstance(raw, Mapping) and set(raw) == {"sources"}:
        raw = raw["sources"]
    if not isinstance(raw, Mapping) or not raw:
        raise UserError(f"{path} names no sources: write 'name: {{rate: 0.18, data: folder/}}', a line each.")
    sources = [_source(path, str(name), entry) for name, entry in raw.items()]
    names = [s.name for s in sources]
    for name in replace:
        if name not in names:
            raise UserError(f"{path} has no source '{name}' to replace (--replace): {did_you_mean(name, names)}")
    total = math.fsum(s.rate for s in sources)
    if abs(total - 1) > 1e-6:
        raise UserError(f"The rates in {path} must sum to 1, but sum to {total:g}.")
    replaced = set(replace) or {s.name for s in sources if not s.data}
    if not replaced:
        raise UserError(f"Say which source of {path} the domain replaces (--replace), such as the web crawl.")
    kept = [s for s in sources if s.name not in replaced and s.rate > 0]
    for source in kept:
        if not source.data:
            raise UserError(f"{path}: the source '{source.name}' has a rate of {source.rate:g} but no data.")
    share = math.fsum(s.rate for s in sources if s.name in replaced)
    if share <= 1e-9:
        raise UserError(f"{path}: what the domain replaces has a rate of 0, so nothing is left for the domain.")
    return kept, share


def _source(path: Path, name: str, entry: Any) -> General:
    if isinstance(entry, int | float):
        entry = {"rate": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("rate"), int | float):
        raise UserError(f"{path}: the source '{name}' needs a rate, such as 'rate: 0.045'.")
    unknown = set(entry) - {"rate", "data", "text_field"}
    if unknown:
        raise UserError(
            f"{path}: the source '{name}' has no setting '{min(unknown)}': "
            f"{did_you_mean(min(unknown), ['rate', 'data', 'text_field'])}"
        )
    rate = float(entry["rate"])
    if not (rate >= 0 and math.isfinite(rate)):
        raise UserError(f"{path}: the rate of '{name}' must be 0 or more, not {rate}.")
    data = entry.get("data", ())
    data = [data] if isinstance(data, str) else data or []
    if not isinstance(data, list) or not all(isinstance(d, str) for d in data):
        raise UserError(f"{path}: the data of '{name}' must be a path or a list of them, not {entry['data']!r}.")
    found = tuple(str(path.parent / d) if (path.parent / d).exists() else str(d) for d in data)
    return General(name, rate, found, str(entry.get("text_field", "text")))
