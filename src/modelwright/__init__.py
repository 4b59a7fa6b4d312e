"""Modelwright: published methods for language models, as ordinary Hugging Face parts.

Nothing heavy is imported here, so that the command line answers at once.
"""

__version__ = "0.1.0"
