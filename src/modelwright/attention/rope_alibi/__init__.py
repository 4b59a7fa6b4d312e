"""RoPE × ALiBi with a harmonic series: one score that keeps RoPE's quality and ALiBi's reach (arXiv 2410.18441)."""

from modelwright.attention.rope_alibi.attention import RopeAlibiConfig, rope_alibi_attention
from modelwright.attention.rope_alibi.bias import harmonic_numbers, head_slopes, penalty

__all__ = ["RopeAlibiConfig", "harmonic_numbers", "head_slopes", "penalty", "rope_alibi_attention"]
