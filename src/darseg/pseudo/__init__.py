"""Predictions in, label maps out."""
