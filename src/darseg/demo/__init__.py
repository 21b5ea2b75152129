"""The drawn scenes and the command that trains on them."""
