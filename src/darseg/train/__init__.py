"""Batches in, checkpoint out."""
