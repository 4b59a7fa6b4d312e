"""SAQ: a key/value cache whose precision falls in steps with age (arXiv 2410.18441)."""

from modelwright.attention.saq.attention import NAME, staircase_attention
from modelwright.attention.saq.cache import KiviCache, StaircaseQuantizedCache
from modelwright.attention.saq.memory import Level, memory_table, plot_memory, staircase_bytes

__all__ = [
    "NAME",
    "KiviCache",
    "Level",
    "StaircaseQuantizedCache",
    "memory_table",
    "plot_memory",
    "staircase_attention",
    "staircase_bytes",
]
