"""Smaller models: what is taken out, how much of it, and the checkpoint that remains.

What every method of this wing shares stands here: the gates of a model and their cost (``selections``), choosing gates
by score to an exact number of parameters (``budget``), the masked model (``gating``), the smaller model (``pruned``,
``shrink``), calibration text (``calibration``), and what is measured afterwards (``measure``).
"""
