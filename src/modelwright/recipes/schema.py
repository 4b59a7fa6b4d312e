"""What a recipe file may say."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Step(BaseModel):
    """One step: a verb, its options, and the matrix over which it is repeated.

    Attributes:
        uses: A verb of :data:`modelwright.verbs.VERBS`, or ``pick``.
        with_: The verb's options (``with:`` in the file); strings may hold references such as ``${world.output}``.
        matrix: Dimension to its values; the step is repeated for every combination. A value may be a mapping with
            a ``label``, which is then what ids, reports and ``exclude`` show.
        exclude: Combinations to leave out: dimension to a label or a list of labels.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    uses: str
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")
    matrix: dict[str, Any] = Field(default_factory=dict)
    exclude: list[dict[str, Any]] = Field(default_factory=list)


class Recipe(BaseModel):
    """A whole recipe.

    Attributes:
        name: Short name; the run's folder is called so.
        title: The question that the run answers; the report's heading.
        description: Free text.
        workers: Processes that steps run in; 0 means one per core.
        seeds: Seeds, for ``${seeds}``.
        steps: Steps by name. Their order in the file does not matter.
        report: What the report shows; see the report's own schema.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    description: str = ""
    workers: int = Field(default=1, ge=0)
    seeds: list[int] = Field(default_factory=lambda: [0])
    steps: dict[str, Step] = Field(min_length=1)
    report: dict[str, Any] = Field(default_factory=dict)
