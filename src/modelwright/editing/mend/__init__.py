"""MEND: networks that make an edit of a fine-tuning gradient."""
