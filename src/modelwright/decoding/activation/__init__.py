"""Activation decoding: towards tokens that the prompt's hidden states point at sharply (arXiv 2403.01548)."""

from modelwright.decoding.activation.decoding import ActivationDecoding, ActivationOptions, activation_entropy

__all__ = ["ActivationDecoding", "ActivationOptions", "activation_entropy"]
