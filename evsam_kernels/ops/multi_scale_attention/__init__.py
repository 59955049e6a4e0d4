"""Multi-scale linear attention: the whole LiteMLA block in one operation."""
