"""The model's own law: greedy search and sampling, as the control of every other decoding."""

from modelwright.decoding.plain.decoding import PlainDecoding, PlainOptions

__all__ = ["PlainDecoding", "PlainOptions"]
