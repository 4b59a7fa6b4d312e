"""Recipes: a YAML file of steps, run with content-addressed results so that a rerun does only what changed."""
