"""STRING: shifted rotary positions for the far keys of long prompts (arXiv 2410.18745)."""

from modelwright.attention.string.apply import OFFICIAL_FACTOR, AppliedString, StringConfig, apply_string
from modelwright.attention.string.frequency import position_frequency

__all__ = ["OFFICIAL_FACTOR", "AppliedString", "StringConfig", "apply_string", "position_frequency"]
