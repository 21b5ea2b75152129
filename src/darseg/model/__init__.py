"""Image in, logits out: backbones, heads, networks, their weights and whole-image prediction."""
