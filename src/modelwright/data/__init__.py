"""Reading and writing the user's records."""
