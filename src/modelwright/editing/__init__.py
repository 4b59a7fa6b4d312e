"""Changing what a model knows: requests, edits that are put on and taken off, and the editors that make them."""

from modelwright.editing.edit import Edit, WeightEdit, load_edit, revert_all
from modelwright.editing.editor import Editor, make_editor
from modelwright.editing.requests import EditRequest, read_requests
from modelwright.editing.statistics import KeyStatistics

__all__ = [
    "Edit",
    "EditRequest",
    "Editor",
    "KeyStatistics",
    "WeightEdit",
    "load_edit",
    "make_editor",
    "read_requests",
    "revert_all",
]
