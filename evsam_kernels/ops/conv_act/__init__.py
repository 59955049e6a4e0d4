"""Convolution, bias, activation and residual in one operation."""
