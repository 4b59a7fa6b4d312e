"""The ``report:`` block of a recipe: what the report should answer, compare and draw."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _path(value: Any) -> Any:
    if isinstance(value, str) and value.count(".") < 2:
        raise ValueError("must be STEP.result.NAME, such as evaluate.result.bits_per_byte")
    if isinstance(value, str) and value.split(".")[1] != "result":
        raise ValueError("must name a value of a step's result: STEP.result.NAME")
    return value


def _many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Path = Annotated[str, BeforeValidator(_path)]
Names = Annotated[list[str], BeforeValidator(_many)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Compare(_Block):
    """A table of one metric over one or two dimensions of the recipe's matrix, and the sentences drawn from it."""

    title: str
    metric: Path = Field(description="STEP.result.NAME, such as evaluate.result.bits_per_byte.")
    rows: str = Field(description="Matrix dimension that varies down the table.")
    columns: str | None = Field(None, description="Matrix dimension that varies across it.")
    over: str | None = Field(None, description="Dimension whose values are repetitions: the spread is over it.")
    better: Literal["lower", "higher"] = "lower"
    unit: str = ""
    digits: int = Field(3, ge=0, le=8)
    given: str = Field("", description="What was held equal, as the sentence's beginning: 'At equal tokens'.")
    baseline: dict[str, Any] = Field({}, description="Dimension to the value that others are compared with.")
    references: list[Any] = Field(
        [], description="Row or column values that are shown but do not compete: an oracle, a control."
    )
    answer: bool = Field(True, description="Whether the answer at the top speaks of it.")


class Curves(_Block):
    """Lines from a log of JSON rows that every run of a step wrote."""

    title: str
    step: str
    x: str = "tokens"
    y: str = "loss"
    lines: Names = Field([], description="One dimension (colour), or two: the second gives a panel each.")
    over: str | None = Field(None, description="Repetitions: their mean is the line, their range the band.")
    file: str = Field("training_log.jsonl", description="Name of the log, anywhere in the step's folder.")
    unit: str = ""
    label: str = Field("", description="How the quantity reads: its name in the log by default.")
    whole: bool = Field(False, description="Draw the start too, even where it is so steep that it flattens the rest.")


class Selections(_Block):
    """What selection steps chose: composition, precision, scores and documents."""

    step: str
    rows: str = "method"
    over: str | None = None
    group: str = Field("kind", description="Field of a chosen row that says what kind of document it is.")
    target: str | None = Field(None, description="The group that is wanted.")
    text_field: str = "text"
    file: str = Field("chosen.jsonl", description="Name of the chosen rows' file, anywhere in the step's folder.")
    documents: int = Field(3, ge=0, le=50, description="Documents shown per method: its first, and its last two.")


class Samples(_Block):
    """Text that a model wrote."""

    step: str
    prompt: str = Field("prompt", description="Field of the prompt.")
    text: str = Field("completion", description="Field of the continuation.")
    limit: int = Field(6, ge=1, le=100)


class Gallery(_Block):
    """Pictures with their captions from a Parquet file: by rank where rows have one, else some of each kind."""

    step: str
    title: str = "Pictures and captions"
    file: str = Field("chosen.parquet", description="Name of the file, anywhere in the step's folder.")
    rows: str | None = Field(None, description="Matrix dimension: the pictures of each of its values are shown.")
    image: str = Field("image", description="Column of the pictures: bytes of image files, bare or as datasets does.")
    text: str = Field("caption", description="Column of the captions.")
    group: str = Field("kind", description="Column that says what kind of pair it is.")
    target: Names = Field([], description="The kinds that are wanted.")
    rank: str = Field("rank", description="Column of the order in which pairs were chosen.")
    score: str = Field("score", description="Column of the scores.")
    pictures: int = Field(7, ge=1, le=50, description="Pictures shown of each.")


class ReportSpec(_Block):
    """The whole block; every part is optional."""

    question: str = ""
    compare: list[Compare] = []
    curves: list[Curves] = []
    selections: Selections | None = None
    samples: Samples | None = None
    gallery: list[Gallery] = []
    labels: dict[str, str] = Field({}, description="How values of dimensions and groups read: zip-fit: ZIP-FIT.")
