"""A run folder in, pages out."""
