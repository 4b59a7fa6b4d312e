"""Renders a run folder, or a folder of claim results, as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelwright.errors import UserError
from modelwright.files import atomic_path
from modelwright.report.runs import Run, load_run
from modelwright.report.spec import ReportSpec


@dataclass
class Page:
    """What the template of a run is given besides the run.

    Attributes:
        title: Heading.
        question: What was asked, or an empty string.
        answers: Heading (empty for a single comparison) and sentences of each comparison.
        tiles: Number and caption of the key figures.
        comparisons: See :func:`modelwright.report.sections.comparison`.
        curves: See :func:`modelwright.report.sections.curve_figures`.
        selection: See :func:`modelwright.report.sections.selection`.
        samples: Generated text.
        galleries: See :func:`modelwright.report.gallery.galleries`.
        plain: Tables of every step's numbers, when the recipe asks for no comparison.
        making: Settings, versions, machine and times.
        notices: What could not be drawn, and why.
    """

    title: str
    question: str = ""
    answers: list[tuple[str, list[str]]] = field(default_factory=list)
    tiles: list[tuple[str, str]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    selection: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    galleries: list[dict[str, Any]] = field(default_factory=list)
    plain: list[dict[str, Any]] = field(default_factory=list)
    making: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def render(run_dir: Path, output: Path | None = None, force: bool = True) -> Path:
    """Writes the report of a run, which may be unfinished.

    Reads only ``run.json``, ``result.json`` and files that the steps wrote. A part that cannot be drawn is replaced by
    a sentence that says why, so that one missing step does not cost the whole report.

    Args:
        run_dir: A run's folder.
        output: The HTML file; None writes ``report.html`` in the folder.
        force: Replace an existing file.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: The folder is not a run's, or the output cannot be written.
    """
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    html = _environment().get_template("run.html").render(page=build_page(run), run=run.raw)
    return _write(html, output or run_dir / "report.html", force)


def build_page(run: Run) -> Page:
    """Computes everything that the report of a run shows."""
    from modelwright.report import gallery, sections

    raw = run.raw
    page = Page(title=str(raw.get("title") or raw.get("name") or run.folder.name))
    spec = _spec(raw, page)
    page.question = spec.question
    if page.question and page.title == str(raw.get("name")):
        page.title, page.question = page.question, ""
    if run.unfinished:
        page.notices.append(
            f"The run is not finished{_status(raw)}: {run.unfinished} of {run.unfinished + len(run.steps)} steps "
            "have no result yet. What follows is drawn from the others."
        )
    palette = sections.Palette(run, spec.labels)
    for i, comparison in enumerate(spec.compare):
        with _noticing(page):
            sections.add_comparison(page, run, comparison, palette, f"compare-{i}")
    for i, curve in enumerate(spec.curves):
        with _noticing(page):
            page.curves.append(sections.curve_figures(run, curve, palette, f"curves-{i}"))
    if spec.selections is not None:
        with _noticing(page):
            page.selection = sections.selection(run, spec.selections, palette)
    if spec.samples is not None:
        with _noticing(page):
            page.samples = sections.samples(run, spec.samples, palette)
    for pictures in spec.gallery:
        with _noticing(page):
            page.galleries.append(gallery.galleries(run, pictures, palette.labels))
    if not page.comparisons:
        page.plain = sections.plain_tables(run)
    page.making = sections.making(run)
    sections.add_tiles(page, run)
    return page


def _status(raw: Mapping[str, Any]) -> str:
    said = {
        "running": "it was still running when this was drawn",
        "failed": "a step failed",
        "interrupted": "it was stopped",
    }
    return f" ({said[raw['status']]})" if raw.get("status") in said else ""


class _noticing:
    """Turns a UserError into a notice on the page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, UserError):
            self.page.notices.append(str(error))
            return True
        return False


def _spec(raw: Mapping[str, Any], page: Page) -> ReportSpec:
    from pydantic import ValidationError

    try:
        return ReportSpec.model_validate(raw.get("report") or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["report", *map(str, first["loc"])])
        page.notices.append(
            f"The recipe's report block could not be read, so all results are listed: {where}: {first['msg']}."
        )
        return ReportSpec.model_validate({})


def render_claims(results_dir: Path, output: Path | None = None, force: bool = True) -> Path:
    """Writes a page of every claim result in ``results_dir/claims``.

    Raises:
        UserError: There is none, or the output cannot be written.
    """
    from modelwright.verify import results, view

    results_dir = Path(results_dir)
    documents = results.claims(results_dir)
    if not documents:
        raise UserError(f"{results_dir / 'claims'} holds no claim result: `modelwright verify METHOD` writes one.")
    shown = [
        {
            "document": d,
            "tables": view.metric_tables(d),
            "bars": view.bar_rows(d),
            "how": view.how(d),
            "anchor": f"claim-{i}",
        }
        for i, d in enumerate(documents)
    ]
    html = _environment().get_template("claims.html").render(claims=shown)
    return _write(html, output or results_dir / "report.html", force)


def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _write(html: str, output: Path, force: bool) -> Path:
    with atomic_path(output, force) as partial:
        # A lone surrogate in a document (undecodable bytes read leniently) must not cost the report.
        partial.write_text(html, encoding="utf-8", errors="replace")
    return output
