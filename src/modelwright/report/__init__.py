"""The HTML report of a run, drawn from the files of the run alone: :func:`modelwright.report.render.render`."""
