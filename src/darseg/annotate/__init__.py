"""Annotation files of other tools in, label maps out."""
