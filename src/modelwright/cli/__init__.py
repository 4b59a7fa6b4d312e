"""The command line: ``modelwright VERB``. Imports nothing heavy, so that ``--help`` and ``list`` answer at once."""

from modelwright.cli.app import main

__all__ = ["main"]
