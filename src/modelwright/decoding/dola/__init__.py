"""DoLa: the last layer against an early one (arXiv 2309.03883)."""

from modelwright.decoding.dola.decoding import DoLaDecoding, DoLaOptions

__all__ = ["DoLaDecoding", "DoLaOptions"]
