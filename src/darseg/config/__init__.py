"""What a user writes: the recipe (recipe.py) and its YAML text (text.py)."""
