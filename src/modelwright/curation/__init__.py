"""Choosing and cleaning data."""
