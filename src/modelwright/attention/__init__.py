"""Attention: how a trained model reads its context, changed without training."""
