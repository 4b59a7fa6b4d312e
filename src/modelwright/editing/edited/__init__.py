"""Saved edits as a part of decoding: on the model while it generates, and only then."""

from modelwright.editing.edited.options import EditedOptions

__all__ = ["EditedOptions"]
