"""ReLU linear attention over the pixels of a map."""
