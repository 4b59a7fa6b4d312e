"""PrFlashAttention: blocks of keys that take part by a probability of their distance (arXiv 2410.18441)."""

from modelwright.attention.prflash.attention import ProbFlashConfig, prob_flash_attention
from modelwright.attention.prflash.blocks import block_attention
from modelwright.attention.prflash.law import Participation, draw_blocks, fixed_blocks

__all__ = [
    "Participation",
    "ProbFlashConfig",
    "block_attention",
    "draw_blocks",
    "fixed_blocks",
    "prob_flash_attention",
]
