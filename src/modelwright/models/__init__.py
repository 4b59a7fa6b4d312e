"""Loading, saving, tiny models, and where each family keeps its parts."""
