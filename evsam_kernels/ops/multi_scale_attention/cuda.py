"""`multi_scale_attention` with its aggregations and attention in one CUDA launch, up to three.

qkv and the projection are products of `conv_act` in Triton. Head dimensions without a kernel are
padded with channels of zeros, which add nothing to any sum, and smaller kernels of the depthwise
convolutions with taps of zeros to the largest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from evsam_kernels.cuda import launch
from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.conv_act.triton import conv_act, conv_precision
from evsam_kernels.ops.gpu import Limits, limits
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.mbconv.triton import largest_values

DTYPES = HALF_AND_SINGLE

_WARPS = {16: 16, 32: 16, 64: 4}  # of a block, by the head dimensions that there are kernels for
_SMALL = 256  # tokens of a tile that is not split further: its halo would outweigh it
_STATE, _OUTPUT = 1, 2  # phases of the kernel


def multi_scale_attention(
    x: Tensor,  # [B, C_in, H, W]
    qkv_weight: Tensor,  # [heads * 3 * dim, C_in, 1, 1]
    qkv_bias: Tensor | None,  # [heads * 3 * dim]
    depth_weights: Sequence[Tensor],  # per scale [heads * 3 * dim, 1, k, k]
    depth_biases: Sequence[Tensor],  # per scale [heads * 3 * dim], or empty
    group_weights: Sequence[Tensor],  # per scale [heads * 3 * dim, dim, 1, 1]
    group_biases: Sequence[Tensor],  # per scale [heads * 3 * dim], or empty
    proj_weight: Tensor,  # [C_out, heads * dim * (1 + scales), 1, 1]
    proj_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H, W]
    head_dim: int,
    eps: float = 1e-15,
) -> Tensor:  # [B, C_out, H, W]
    """proj(attention(qkv and its aggregations at every scale)) + residual, sums in float32."""
    batch, _, height, width = x.shape
    if batch == 0:
        return conv_act(
            x.new_empty(0, proj_weight.shape[1], height, width), proj_weight, proj_bias, residual
        )
    dim = next((dim for dim in _WARPS if dim >= head_dim), None)
    if dim is None:
        raise ValueError(
            f"multi_scale_attention: head_dim must be at most {max(_WARPS)} with backend "
            f'"cuda", got {head_dim}; use backend="triton"'
        )
    groups = qkv_weight.shape[0] // head_dim
    more = dim - head_dim

    def padded(operand: Tensor) -> Tensor:
        """Every group of output channels brought to `dim`."""
        rows = operand.reshape(groups, head_dim, -1)
        return F.pad(rows, (0, 0, 0, more)).reshape(groups * dim, *operand.shape[1:])

    if more:
        qkv_weight = padded(qkv_weight)
        qkv_bias = None if qkv_bias is None else padded(qkv_bias)
        depth_weights = [padded(weight) for weight in depth_weights]
        depth_biases = [padded(bias) for bias in depth_biases]
        group_weights = [F.pad(padded(w), (0, 0, 0, 0, 0, more)) for w in group_weights]
        group_biases = [padded(bias) for bias in group_biases]
        columns = proj_weight.reshape(proj_weight.shape[0], -1, head_dim)
        proj_weight = F.pad(columns, (0, more)).reshape(proj_weight.shape[0], -1, 1, 1)

    x = channels_last(x)
    qkv_largest = out_largest = None
    if x.dtype == torch.float16:
        qkv_largest, out_largest = _largest(
            x, qkv_weight, qkv_bias, depth_weights, depth_biases, group_weights, group_biases
        )
    qkv = conv_act(x, qkv_weight, qkv_bias, None, y_largest=qkv_largest)

    kernel = max((weight.shape[-1] for weight in depth_weights), default=1)
    out_channels = groups // 3 * dim * (1 + len(depth_weights))
    attended = empty_channels_last(x, (batch, out_channels, height, width))
    _attend(
        qkv,
        _stacked([_taps(weight, kernel, dim) for weight in depth_weights]),
        _stacked(depth_biases),
        _stacked(group_weights),
        _stacked(group_biases),
        attended,
        qkv_largest,
        out_largest,
        kernel,
        dim,
        eps,
    )
    return conv_act(attended, proj_weight, proj_bias, residual, x_largest=out_largest)


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    return torch.stack([tensor.contiguous() for tensor in tensors]) if tensors else None


def _taps(weight: Tensor, kernel: int, dim: int) -> Tensor:
    """`[groups, kernel * kernel, dim]` from `[groups * dim, 1, k, k]`."""
    border = (kernel - weight.shape[-1]) // 2
    wide = F.pad(weight, (border, border, border, border))
    return wide.reshape(-1, dim, kernel * kernel).transpose(1, 2)


def _shared(
    tile: tuple[int, int], parts: int, kernel: int, dim: int, scales: int, element: int
) -> int:
    """Bytes of shared memory of a block, as the kernel lays it out."""
    lines = 128 // dim
    columns = 16 // lines
    map_height = -(-tile[0] // lines) * lines + kernel - 1
    map_width = (-(-tile[1] // columns) * columns + kernel - 1) | 1
    pitch, warps = dim + 8, _WARPS[dim]
    floats = 2 * kernel * kernel * dim + 2 * dim * pitch
    floats += max(warps * 16 * pitch, warps // 2 * (min(dim, 32) + 1) * (dim + 4))
    floats += (1 + scales) * (dim + 8) * pitch
    pixels = map_height * map_width
    return parts * pixels * dim * element + 4 * floats


@functools.lru_cache(maxsize=256)
def _tile(
    height: int,
    width: int,
    images: int,  # and heads: blocks for each tile
    kernel: int,
    dim: int,
    scales: int,
    element: int,  # bytes
    gpu: Limits,
) -> tuple[int, int]:
    """The largest tile `(height, width)` of which there are enough to give every SM a block."""
    fitting = []
    for down, across in product(range(1, height + 1), range(1, width + 1)):
        tile = (-(-height // down), -(-width // across))
        if _shared(tile, 2, kernel, dim, scales, element) <= gpu.shared:
            enough = images * down * across >= gpu.multiprocessors
            small = tile[0] * tile[1] <= _SMALL
            fitting.append((not (enough or small), down * across, down + across, tile))
    if not fitting:
        raise ValueError(
            f"multi_scale_attention: a depthwise kernel of {kernel} x {kernel} needs more shared "
            f'memory than the {gpu.shared} bytes of a block with backend "cuda"; use '
            'backend="triton"'
        )
    return min(fitting)[3]


def _whole(images: int, heads: int, tiles: int, multiprocessors: int) -> int:
    """Images of which a block takes all tiles of a head; blocks take a tile each of the others.

    As many as let the launches end soonest, where a multiprocessor has one block at a time.
    """

    def turns(whole: int) -> float:
        split = math.ceil((images - whole) * heads * tiles / multiprocessors) / tiles
        return math.ceil(whole * heads / multiprocessors) + split

    return min(range(images, -1, -1), key=turns)


def _attend(
    qkv: Tensor,  # [B, heads * 3 * dim, H, W]
    depth_weight: Tensor | None,  # [scales, heads * 3, kernel * kernel, dim]
    depth_bias: Tensor | None,  # [scales, heads * 3 * dim]
    group_weight: Tensor | None,  # [scales, heads * 3 * dim, dim, 1, 1]
    group_bias: Tensor | None,  # [scales, heads * 3 * dim]
    out: Tensor,  # [B, (1 + scales) * heads * dim, H, W]
    qkv_largest: Tensor | None,
    out_largest: Tensor | None,
    kernel: int,
    dim: int,
    eps: float,
) -> None:
    """Aggregate and attend at every scale, into `out`."""
    batch, channels, height, width = qkv.shape
    heads = channels // (3 * dim)
    scales = 0 if depth_weight is None else depth_weight.shape[0]
    element = qkv.element_size()
    gpu = limits(qkv)
    tile = _tile(height, width, batch * heads, kernel, dim, scales, element, gpu)
    tiles = -(-height // tile[0]) * -(-width // tile[1])
    whole = _whole(batch, heads, tiles, gpu.multiprocessors)
    name = str(qkv.dtype).removeprefix("torch.")
    if qkv.dtype == torch.float32 and conv_precision() == "tf32":
        name = "tf32"
    parts = None
    if whole < batch:
        size = (batch - whole, heads, tiles, 1 + scales, dim + 1, dim)
        parts = torch.empty(size, dtype=torch.float32, device=qkv.device)
    for phases, first, end, blocks in (
        (_STATE | _OUTPUT, 0, whole, 1),
        (_STATE, whole, batch, tiles),
        (_OUTPUT, whole, batch, tiles),
    ):
        if first == end:
            continue
        launch(
            "multi_scale_attention",
            f"multi_scale_attention_{name}_{dim}",
            (blocks, heads, end - first),
            32 * _WARPS[dim],
            _shared(tile, 2 if phases & _STATE else 1, kernel, dim, scales, element),
            [
                ("qkv", qkv),
                ("depth_weight", depth_weight),
                ("depth_bias", depth_bias),
                ("group_weight", group_weight),
                ("group_bias", group_bias),
                ("out", out),
                ("parts", parts),
                ("qkv_largest", qkv_largest),
                ("out_largest", out_largest),
                ("height", height),
                ("width", width),
                ("heads", heads),
                ("scales", scales),
                ("kernel", kernel),
                ("tile_height", tile[0]),
                ("tile_width", tile[1]),
                ("turns", tiles // blocks),
                ("first_image", first),
                ("phases", phases),
                ("eps", eps),
            ],
        )


def _largest(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    depth_weights: Sequence[Tensor],
    depth_biases: Sequence[Tensor],
    group_weights: Sequence[Tensor],
    group_biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Bounds, float32 `[1]`, of qkv, and of it and every scale's aggregation."""
    if not depth_weights:
        (of_qkv,) = largest_values(x, qkv_weight, qkv_bias, None, None)
        return of_qkv, of_qkv
    bounds: list[Tensor] = []
    for scale, (depth_weight, group_weight) in enumerate(
        zip(depth_weights, group_weights, strict=True)
    ):
        depth_bias = depth_biases[scale] if depth_biases else None
        of_qkv, filtered = largest_values(x, qkv_weight, qkv_bias, depth_weight, depth_bias)
        of_row = group_weight.abs().sum(dim=(1, 2, 3), dtype=torch.float32).amax()
        base = group_biases[scale].abs().amax().float() if group_biases else 0.0
        bounds.append(of_row * filtered + base)
    return of_qkv, torch.stack([of_qkv, *bounds]).amax(dim=0)
