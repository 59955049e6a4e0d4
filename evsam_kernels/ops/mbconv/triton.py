"""`mbconv` as three launches of the Triton kernels of `conv_act`.

The depthwise convolution between the products needs a stencil in shared memory to be fused with them,
which Triton does not offer: the expanded tensor goes through global memory, once before and once after
it.
"""

from __future__ import annotations

from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.conv_act.triton import conv_act

DTYPES = HALF_AND_SINGLE


def mbconv(
    x: Tensor,  # [B, C_in, H, W]
    expand_weight: Tensor,  # [C_mid, C_in, 1, 1]
    expand_bias: Tensor | None,  # [C_mid]
    depth_weight: Tensor,  # [C_mid, 1, k, k]
    depth_bias: Tensor | None,  # [C_mid]
    point_weight: Tensor,  # [C_out, C_mid, 1, 1]
    point_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H_out, W_out]
    stride: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """conv1x1(act(depthwise(act(conv1x1(x) + bias)) + bias)) + bias + residual."""
    expanded = conv_act(x, expand_weight, expand_bias, None, activation=activation)
    filtered = conv_act(
        expanded,
        depth_weight,
        depth_bias,
        None,
        stride=stride,
        groups=depth_weight.shape[0],
        activation=activation,
    )
    return conv_act(filtered, point_weight, point_bias, residual)
