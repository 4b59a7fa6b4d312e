"""Objectives and optimisation."""
