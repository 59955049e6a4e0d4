"""`mbconv` as two launches: the CUDA kernel of the first two convolutions, and a product.

The expanded tensor stays in shared memory; what the depthwise convolution makes of it goes through
global memory. Projecting it in the same launch would take blocks that hold all hidden channels of
their pixels, few for small maps, and with stride 1 there is as much to write as was saved. In
float16 what lies between may exceed the range where the result does not: see `mbconv` in Triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evsam_kernels import cuda
from evsam_kernels.ops.checks import HALF_AND_SINGLE, conv_output_size
from evsam_kernels.ops.conv_act.triton import conv_act, conv_precision
from evsam_kernels.ops.gpu import limits
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.mbconv.tiles import GROUP, tile_of
from evsam_kernels.ops.mbconv.triton import largest_values

DTYPES = HALF_AND_SINGLE

_CHUNK = 8
_ACTIVATIONS = {
    name: code for code, name in enumerate((None, "relu", "relu6", "hswish", "silu", "gelu"))
}


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy at an address that 16 bytes can be copied from."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _padded(tensor: Tensor, axis: int) -> Tensor:
    """The tensor with zeros behind it on an axis, up to whole chunks."""
    missing = -tensor.shape[axis] % _CHUNK
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, missing)) if missing else tensor


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _padded(tensor, 0).contiguous()


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
    expanded_largest, filtered_largest = None, None
    if x.dtype == torch.float16 and x.numel() > 0:
        expanded_largest, filtered_largest = largest_values(
            x, expand_weight, expand_bias, depth_weight, depth_bias
        )
    filtered = expand_depthwise(
        channels_last(_padded(x, 1)),
        _padded(_padded(expand_weight, 0), 1),
        _vector(expand_bias),
        _padded(depth_weight, 0),
        _vector(depth_bias),
        expanded_largest,
        filtered_largest,
        stride,
        activation,
    )
    return conv_act(
        filtered, _padded(point_weight, 1), point_bias, residual, x_largest=filtered_largest
    )


def expand_depthwise(
    x: Tensor,  # [B, C_in, H, W]
    expand_weight: Tensor,  # [C_mid, C_in, 1, 1]
    expand_bias: Tensor | None,
    depth_weight: Tensor,  # [C_mid, 1, k, k]
    depth_bias: Tensor | None,
    expanded_largest: Tensor | None,
    filtered_largest: Tensor | None,
    stride: int,
    activation: str | None,
) -> Tensor:  # [B, C_mid, H_out, W_out]
    """act(depthwise(act(conv1x1(x) + bias)) + bias); channels are whole chunks."""
    batch, channels, height, width = x.shape
    mid_channels, kernel = expand_weight.shape[0], depth_weight.shape[-1]
    if height * width * channels >= 1 << 31 or mid_channels * max(channels, kernel**2) >= 1 << 31:
        raise ValueError(
            f"mbconv: the cuda backend takes maps and weights of less than 2**31 elements an "
            f"image, got {height} x {width} x {channels} and {mid_channels} hidden channels; "
            f"choose backend='triton'"
        )
    out = (conv_output_size(height, stride), conv_output_size(width, stride))
    y = empty_channels_last(x, (batch, mid_channels, *out))
    groups = -(-mid_channels // GROUP)
    special = kernel == 3 and stride in (1, 2) and activation == "gelu"
    special = special and x.dtype != torch.float32
    gpu = limits(x)
    tile = tile_of(
        *(x.dtype, batch, (height, width), kernel, stride, special, groups),
        *(gpu.multiprocessors, gpu.shared),
    )
    dtype = str(x.dtype).removeprefix("torch.")
    if x.dtype == torch.float32 and conv_precision() == "tf32":
        dtype = "tf32"
    stencil = f"stride{stride}" if special else "any"
    tiles = -(-out[0] // tile.height) * -(-out[1] // tile.width)
    cuda.launch(
        "mbconv",
        f"expand_depthwise_{dtype}_{stencil}_{tile.rows}",
        (batch * tiles * groups, 1, 1),
        32 * tile.warps,
        tile.shared,
        [
            ("x", _aligned(x)),
            ("expand_weight", _aligned(expand_weight.contiguous())),
            ("expand_bias", None if expand_bias is None else _aligned(expand_bias)),
            ("depth_weight", _aligned(depth_weight.contiguous())),
            ("depth_bias", None if depth_bias is None else _aligned(depth_bias)),
            ("y", y),
            ("expanded_largest", expanded_largest),
            ("filtered_largest", filtered_largest),
            ("height", height),
            ("width", width),
            ("channels", channels),
            ("mid_channels", mid_channels),
            ("out_height", out[0]),
            ("out_width", out[1]),
            ("tile_height", tile.height),
            ("tile_width", tile.width),
            ("kernel", kernel),
            ("stride", stride),
            ("activation", _ACTIVATIONS[activation]),
        ],
    )
    return y
