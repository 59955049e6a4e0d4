"""Sum of maps resized to one size."""
