"""1x1 convolution, depthwise convolution and 1x1 convolution in one operation."""
