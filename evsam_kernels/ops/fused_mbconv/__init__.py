"""3x3 convolution, activation and 1x1 convolution in one operation."""
