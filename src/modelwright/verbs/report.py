"""``modelwright report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from modelwright.errors import UserError
from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Report:
    """Draw a run's report again, as one HTML file that loads nothing and runs no script.

    DIRECTORY is the folder that `modelwright run` wrote; the run may be unfinished. A results folder, with
    claims/*.json in it, gives a page of claims.
    """

    directory: Annotated[Path, Arg("A run's folder, or a results folder.", positional=True, kind="input")]
    output: Annotated[
        Path | None, Arg("The HTML file. Default: report.html in the folder.", kind="output", filename="report.html")
    ] = None
    force: Annotated[bool, Arg("Replace the output if it exists.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Writes the report.

        Returns:
            ``output``: path of the HTML file; ``bytes``: its size.

        Raises:
            UserError: The folder is neither, or the output exists.
        """
        from modelwright.files import check_output
        from modelwright.report.render import render, render_claims

        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is not a folder: give a run's folder, or one with claims/*.json in it.")
        if self.output is not None:
            check_output(self.output, self.force)
        # Without --output the file is the folder's own report, which is made to be drawn again.
        is_claims = not (self.directory / "run.json").exists() and (self.directory / "claims").is_dir()
        path = (render_claims if is_claims else render)(self.directory, self.output, self.output is None or self.force)
        return {"output": str(path), "bytes": path.stat().st_size}
