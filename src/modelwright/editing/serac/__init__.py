"""SERAC: a memory of edits, a classifier of their scope, and a small model that answers within it."""
