"""The stages in which SAM's mask decoder is computed when many prompts share an image."""
