"""LayerNorm over the channels of every pixel."""
