"""GRACE: a codebook beside a layer, which answers inputs near the edited ones."""

from modelwright.editing.grace.codebook import Codebook, Entry, Record
from modelwright.editing.grace.edit import GraceEdit
from modelwright.editing.grace.editor import GRACE

__all__ = ["GRACE", "Codebook", "Entry", "GraceEdit", "Record"]
