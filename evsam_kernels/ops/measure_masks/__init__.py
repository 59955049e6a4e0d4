"""Mask logits at the size of the image, thresholded and measured."""
