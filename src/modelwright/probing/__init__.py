"""What a model has learnt, looked at without changing it."""
