"""Which files hold the pairs, which of their fields, and reading them into memory-mapped tables."""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.data import formats
from modelwright.data.sources import Source, resolve
from modelwright.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

#: Names by which fields are found, the first that is there; the case of letters does not matter.
IMAGE_FIELDS = (
    "image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_path", "image_file", "file_name",
    "filename",
)  # fmt: skip
CAPTION_FIELDS = ("text", "caption", "txt", "description", "alt_text", "alt", "title")
QUERY_FIELDS = ("query", "anchor", "question", "sentence1", "text1")
KEY_FIELDS = ("positive", "pos", "key", "answer", "document", "passage", "response", "sentence2", "text2")
_NEGATIVE = re.compile(r"(negatives?|neg)([_-]?\d+)?", re.IGNORECASE)
_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "tar": "webdataset"}


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a pair; ``a.b`` is field ``b`` of the object in field ``a``.

    Attributes:
        query: Image or first text.
        key: Text that belongs to it.
        negatives: Hard negatives: several fields of texts, or one of texts or of lists of them; may be none.
        image: Whether the query is an image.
    """

    query: str
    key: str
    negatives: tuple[str, ...]
    image: bool

    @property
    def columns(self) -> list[str]:
        """The columns that must be read."""
        return list(dict.fromkeys(name.split(".")[0] for name in (self.query, self.key, *self.negatives)))

    @property
    def texts(self) -> list[str]:
        """The fields that hold a text."""
        return [self.key] if self.image else [self.query, self.key]


@dataclass(frozen=True, eq=False)
class Part:
    """Files of one format in one folder, or a hub data set, or a data set in memory.

    Attributes:
        data: All columns; images are not decoded.
        fields: Which of them make a pair.
        base: Folder that paths of images start from.
        files: What was read; none for hub data sets and those in memory.
        format: Of the files.
        name: For messages.
    """

    data: Dataset
    fields: Fields
    base: Path | None
    files: tuple[Path, ...]
    format: str
    name: str

    def where(self, rows: Sequence[int]) -> list[str]:
        """Returns file and line of some rows, which takes one more reading of the files."""
        if not self.files:
            return [f"{self.name}: row {row + 1}" for row in rows]
        if self.format == "tar":
            keys = self.data.select_columns(["__url__", "__key__"])
            return [f"{keys[int(row)]['__url__']}: {keys[int(row)]['__key__']}" for row in rows]
        wanted, position = set(rows), 0
        found: dict[int, str] = {}
        last = max(wanted)
        with contextlib.suppress(UserError):
            for file in self.files:
                if self.format == "parquet":
                    import pyarrow.parquet

                    count = pyarrow.parquet.read_metadata(file).num_rows
                    found |= {r: f"{file}: row {r - position + 1}" for r in wanted if 0 <= r - position < count}
                    position += count
                    continue
                with contextlib.closing(_records(file, self.format)) as records:
                    for _, place in records:
                        if position in wanted:
                            found[position] = place
                        position += 1
                        if position > last:
                            break
                if position > last:
                    break
        return [found.get(row) or f"{self.name}: row {row + 1}" for row in rows]


def read_parts(
    sources: Sequence[str | Path],
    query_field: str | None,
    key_field: str | None,
    negative_field: str | None,
    base: str | Path | None,
) -> list[Part]:
    """Opens sources as memory-mapped tables, in order.

    Raises:
        UserError: A source does not exist, is damaged, or lacks a field.
    """
    asked = (query_field, key_field, negative_field)
    found = [s for source in sources for s in _resolve(str(source))]
    parts = []
    # Paths of images are relative to the folder of the file that names them, so files of one folder go together.
    for (kind, form, folder), group in itertools.groupby(
        found, key=lambda s: (s.kind, s.format or _suffix(s.path), s.path.parent if s.path else s.name)
    ):
        members = list(group)
        if kind == "hub":
            parts += [make_part(_hub(member.name), asked, base, name=member.name) for member in members]
            continue
        files = tuple(member.path for member in members if member.path is not None)
        if form == "saved":
            parts.append(make_part(_saved(files[0].parent), asked, base or folder, name=str(folder)))
            continue
        name = str(files[0]) if len(files) == 1 else f"{folder} ({files[0].name}, …)"
        data = _load(files, str(form), name, asked)
        parts.append(make_part(data, asked, base or folder, files=files, form=str(form), name=name))
    return parts


def _resolve(source: str) -> list[Source]:
    path = Path(source).expanduser()
    if path.suffix.lower() == ".tar" and path.is_file():
        return [Source(source, "file", path)]
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            if not (path / "train").is_dir():
                raise UserError(f"{path} holds several splits and none is called 'train': name the folder of one.")
            return _resolve(str(path / "train"))
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return [Source(source, "file", path / "state.json")]
        if tars := sorted(p for p in path.rglob("*.tar") if p.is_file()):
            return [Source(str(p), "file", p) for p in tars]
    elif source.lower().endswith(".tar") and (matches := sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207
        return [Source(m, "file", Path(m)) for m in matches]
    found = resolve([source])
    for one in found:
        if one.kind == "stdin":
            raise UserError("Pairs cannot be read from standard input: they are read in random order. Name a file.")
        if one.format == "text":
            raise UserError(
                f"{one.path} holds plain text, not pairs: give JSONL, Parquet, CSV or WebDataset tar files, with an "
                f"image or query and a text in each record."
            )
    return found


def _suffix(path: Path | None) -> str:
    return "saved" if path is not None and path.name == "state.json" else "tar"


def make_part(
    data: Dataset,
    asked: tuple[str | None, str | None, str | None],
    base: str | Path | None,
    *,
    files: tuple[Path, ...] = (),
    form: str = "",
    name: str = "the data set",
) -> Part:
    """Finds the fields of a data set and turns decoding of images off.

    Raises:
        UserError: A field is missing, or the data set has no row.
    """
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise UserError(f"{name} is a {type(data).__name__}: pairs need a datasets.Dataset with known length.")
    if not len(data):
        raise UserError(f"{name} holds no pairs: give a source with at least one.")
    images = [n for n, feature in data.features.items() if isinstance(feature, datasets.Image)]
    fields = find_fields(data.column_names, asked, images, name)
    for column in images:
        if data.features[column].decode:
            data = data.cast_column(column, datasets.Image(decode=False))
    return Part(data, fields, Path(base) if base is not None else None, files, form, name)


def find_fields(
    columns: Sequence[str],
    asked: tuple[str | None, str | None, str | None],
    images: Sequence[str],
    name: str,
) -> Fields:
    """Returns the fields of a pair: those asked for, others by their customary names.

    Args:
        columns: Names of the columns.
        asked: Query, key and negatives, or None.
        images: Columns that are known to hold images.
        name: Source, for messages.

    Raises:
        UserError: One is not there, or there are several pairs to choose from.
    """
    there = f"(fields: {', '.join(columns) or 'none'})"
    for option, field in zip(("query-field", "key-field", "negative-field"), asked):
        if (
            field is not None
            and field.split(".")[0] not in columns
            and not (option == "negative-field" and _numbered(columns, field))
        ):
            near = did_you_mean(field, columns)
            raise UserError(f"{name} has no field '{field}' {there}{'; ' + near if near.startswith('did') else '.'}")
    query, key, negative = asked
    image = query in images or (query is not None and query.lower().rsplit(".", 1)[-1] in IMAGE_FIELDS)
    if query is None:
        picture = next(iter(images), None) or _first(columns, IMAGE_FIELDS)
        question = _first(columns, QUERY_FIELDS)
        if picture and question and key is None and _first(columns, CAPTION_FIELDS) and _first(columns, KEY_FIELDS):
            raise UserError(
                f"{name} holds images ('{picture}') and pairs of texts ('{question}') {there}: say which to use with "
                f"query_field and key_field (--query-field, --key-field)."
            )
        image = bool(picture) and (not question or key is not None or bool(_first(columns, CAPTION_FIELDS)))
        query = picture if image else question
    if query is None:
        raise UserError(
            f"{name} has no field that looks like an image or a query {there}: name it with query_field "
            f"(--query-field)."
        )
    if key is None:
        key = _first([c for c in columns if c != query], CAPTION_FIELDS if image else KEY_FIELDS)
        if key is None and not image:  # the question of a pair may stand in any of them
            key = _first([c for c in columns if c != query], CAPTION_FIELDS)
    if key is None:
        raise UserError(
            f"{name} has no field that looks like the text that belongs to '{query}' {there}: name it with key_field "
            f"(--key-field)."
        )
    if negative is None:
        negatives = [c for c in columns if _NEGATIVE.fullmatch(c) and c not in (query, key)]
    elif negative.split(".")[0] in columns:
        negatives = [negative]
    else:
        negatives = _numbered(columns, negative)
    return Fields(query, key, tuple(sorted(negatives, key=_number)), image)


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {c.lower(): c for c in reversed(columns)}
    return next((lower[n] for n in names if n in lower), None)


def _numbered(columns: Sequence[str], stem: str) -> list[str]:
    return [c for c in columns if re.fullmatch(re.escape(stem) + r"[_-]?\d+", c)]


def _number(name: str) -> int:
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else -1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _hub(name: str) -> Any:
    import datasets

    identifier, _, split = name.partition("@")
    identifier, _, config = identifier.partition(":")
    try:
        with _quiet():
            return datasets.load_dataset(identifier, config or None, split=split or "train")
    except Exception as error:  # datasets, huggingface_hub and the network raise errors of many families
        raise UserError(
            f"{name} is no file here, and reading it as a hub data set failed ({_first_line(error)}): check the name, "
            f"the configuration (org/name:config), the split (org/name@split) and the network."
        ) from error


def _saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, json and datasets have errors of their own
        raise UserError(f"{folder} could not be read as a saved data set: {_first_line(error)}.") from error


def _load(files: tuple[Path, ...], form: str, name: str, asked: tuple[str | None, str | None, str | None]) -> Any:
    import datasets

    options: dict[str, Any] = {}
    if form in ("csv", "tsv"):
        # Numbers, and words such as 'None' and 'NA', are texts too where a text is expected.
        fields = find_fields(_header(files[0], form), asked, [], name)
        options = {
            "sep": "," if form == "csv" else "\t",
            "converters": dict.fromkeys(fields.columns, str),
            "keep_default_na": False,
            "na_values": [""],
        }
    try:
        with _quiet():
            return datasets.load_dataset(
                # The names are patterns to the library.
                _BUILDERS[form],
                data_files=[glob.escape(str(f.resolve())) for f in files],
                split="train",
                **options,
            )
    except Exception as error:
        rows = 0
        for file in files if form != "tar" else ():
            rows += sum(1 for _ in _records(file, form))  # says exactly where, if the fault is one of the format
        if not rows and form != "tar":
            raise UserError(f"{name} holds no pairs: give a source with at least one.") from error
        cause = error.__cause__ or error
        raise UserError(f"{name} could not be read as {form}: {_first_line(cause)}.") from error


def _records(file: Path, form: str) -> formats.Rows:
    name = str(file)
    if form == "parquet":
        yield from formats.read_parquet(file, name, "strict", None)
        return
    with formats.open_bytes(file, name) as stream:
        if form == "jsonl":
            yield from formats.read_jsonl(stream, name, "strict")
        elif form == "json":
            yield from formats.read_json(stream, name, "strict")
        else:
            yield from formats.read_csv(stream, name, "strict", "\t" if form == "tsv" else ",")


def _header(file: Path, form: str) -> list[str]:
    with formats.open_bytes(file, str(file)) as stream:
        try:
            first = stream.readline().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:1 is not valid UTF-8: repair the file.") from error
    return next(csv.reader([first], delimiter="\t" if form == "tsv" else ","), [])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
