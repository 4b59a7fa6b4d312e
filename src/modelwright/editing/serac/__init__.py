"""SERAC: a memory of edits, a classifier of their scope, and a small model that answers within it."""

from modelwright.editing.serac.edit import SeracEdit
from modelwright.editing.serac.editor import SERAC
from modelwright.editing.serac.parts import SeracParts

__all__ = ["SERAC", "SeracEdit", "SeracParts"]
