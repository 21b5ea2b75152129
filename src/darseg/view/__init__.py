"""The local viewer of a run's pseudo labels."""
