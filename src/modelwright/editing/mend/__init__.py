"""MEND: networks that make an edit of a fine-tuning gradient."""

from modelwright.editing.mend.editor import MEND
from modelwright.editing.mend.network import MendNetworks

__all__ = ["MEND", "MendNetworks"]
