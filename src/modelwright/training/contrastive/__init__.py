"""Contrastive training of dual encoders: image with text, or text with text, at any batch size."""
