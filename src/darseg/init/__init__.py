"""An unknown folder in, a recipe out."""
