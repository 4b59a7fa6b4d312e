"""`modelwright world`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class World:
    """Make a testbed whose truth is known: real text, text domains, facts, pairs, pictures, or long texts.

    Worlds: stdlib_text, domains, graded, facts, retrieval, task_stream, pictures, fact_pairs. Writes a folder with one
    JSONL file for each split (Parquet where rows hold pictures), and world.json with the parameters, the counts, the
    truth and a fingerprint of all rows.
    """

    name: Annotated[str, Arg("Which world.", positional=True)]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="world")]
    seed: Annotated[int, Arg("The world's seed.")] = 0
    set: Annotated[dict[str, Any], Arg("An option of the world, such as pool_chunks=3000.")] = field(
        default_factory=dict
    )
    force: Annotated[bool, Arg("Replace an existing output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Makes the world; returns output, world, seed, counts, fingerprint."""
        from modelwright.files import atomic_path, check_output, write_json
        from modelwright.worlds import make_world, world_function

        check_output(self.output, self.force)
        world_function(self.name)
        options = dict(self.set)
        if isinstance(options.get("tokenizer"), str):
            from modelwright.models.loading import load_tokenizer

            options["tokenizer"] = load_tokenizer(options["tokenizer"])
        progress.start(f"world {self.name}")
        world = make_world(self.name, self.seed, options)
        made = {
            "world": self.name.replace("-", "_"),
            "parameters": world.parameters,
            "counts": world.counts,
            "truth": world.truth,
            "fingerprint": world.fingerprint(),
        }
        with atomic_path(self.output, self.force) as partial:
            partial.mkdir()
            for split, rows in world.splits().items():
                _write(partial / split, rows)
                progress.advance(len(rows), split)
            write_json(partial / "world.json", made)
        return {
            "output": str(self.output),
            "world": made["world"],
            "seed": self.seed,
            "counts": made["counts"],
            "fingerprint": made["fingerprint"],
        }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a split's rows beside each other in one file: Parquet when they hold pictures, else JSONL."""
    pictures = [key for key, value in rows[0].items() if isinstance(value, bytes)] if rows else []
    if pictures:
        _write_parquet(path.with_name(f"{path.name}.parquet"), rows, pictures)
        return
    import json

    with path.with_name(f"{path.name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: list[dict[str, Any]], pictures: list[str]) -> None:
    """Writes the layout in which `datasets` keeps pictures: whoever reads Parquet finds them too."""
    import pyarrow.parquet
    from datasets import Dataset, Features, Image

    packed = [
        {**row, **{key: {"bytes": row[key], "path": f"{row.get('id', i)}.png"} for key in pictures}}
        for i, row in enumerate(rows)
    ]
    data = Dataset.from_list(packed)
    features = Features({**data.features, **{key: Image() for key in pictures}})
    # Written by hand, because `to_parquet` draws progress bars. The schema carries the features' description.
    pyarrow.parquet.write_table(data.data.table.cast(features.arrow_schema), path, row_group_size=1000)
