"""Attention: how a model reads its context, and by what positions."""
