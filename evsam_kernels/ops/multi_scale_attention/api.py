"""Public function, checks and registration of `multi_scale_attention`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evsam_kernels.ops.checks import (
    check_conv_weight,
    check_map,
    check_operand,
    check_pointwise,
    check_positive,
    check_tensors,
)
from evsam_kernels.ops.registry import register


def _output_shape(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    depth_weights: Sequence[Tensor],
    depth_biases: Sequence[Tensor],
    group_weights: Sequence[Tensor],
    group_biases: Sequence[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[int, int, int, int]:
    op = "multi_scale_attention"
    check_positive(op, head_dim=head_dim)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    check_map(op, "x", x)
    batch, in_channels, height, width = x.shape
    check_pointwise(op, "qkv_weight", qkv_weight)
    check_conv_weight(op, "qkv_weight", qkv_weight, x, in_channels)
    qkv_channels = qkv_weight.shape[0]
    if qkv_channels % (3 * head_dim) != 0:
        raise ValueError(
            f"{op}: qkv_weight must have heads * 3 * head_dim output channels with head_dim "
            f"{head_dim}, got {qkv_channels}"
        )
    check_operand(op, "qkv_bias", qkv_bias, (qkv_channels,), x)

    scales = len(depth_weights)
    if len(group_weights) != scales:
        raise ValueError(
            f"{op}: group_weights must have one tensor per scale, as depth_weights has ({scales}), "
            f"got {len(group_weights)}"
        )
    for name, biases in (("depth_biases", depth_biases), ("group_biases", group_biases)):
        if len(biases) not in (0, scales):
            raise ValueError(
                f"{op}: {name} must be empty or have one tensor per scale ({scales}), "
                f"got {len(biases)}"
            )
        for index, bias in enumerate(biases):
            check_operand(op, f"{name}[{index}]", bias, (qkv_channels,), x)
    for index, weight in enumerate(depth_weights):
        name = f"depth_weights[{index}]"
        check_conv_weight(op, name, weight, x, qkv_channels, groups=qkv_channels)
        if weight.shape[0] != qkv_channels:
            raise ValueError(
                f"{op}: {name} must have {qkv_channels} output channels, got {weight.shape[0]}"
            )
    for index, weight in enumerate(group_weights):
        shape = (qkv_channels, head_dim, 1, 1)
        check_operand(op, f"group_weights[{index}]", weight, shape, x)

    check_pointwise(op, "proj_weight", proj_weight)
    check_conv_weight(op, "proj_weight", proj_weight, x, qkv_channels // 3 * (1 + scales))
    out_channels = proj_weight.shape[0]
    check_operand(op, "proj_bias", proj_bias, (out_channels,), x)
    shape = (batch, out_channels, height, width)
    check_operand(op, "residual", residual, shape, x)
    return shape


_operator = register(
    "multi_scale_attention",
    "Tensor x, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor[]? depth_weights, Tensor[]? depth_biases, "
    "Tensor[]? group_weights, Tensor[]? group_biases, "
    "Tensor proj_weight, Tensor? proj_bias, Tensor? residual, int head_dim, float eps",
    _output_shape,
)


def multi_scale_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    depth_weights: Sequence[Tensor],
    depth_biases: Sequence[Tensor],
    group_weights: Sequence[Tensor],
    group_biases: Sequence[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    head_dim: int,
    eps: float = 1e-15,
    backend: str = "auto",
) -> Tensor:
    """The whole LiteMLA block: qkv, aggregation at every scale, attention, projection, residual.

    Figure 2 of EfficientViT (arXiv 2205.14756) after folding BatchNorm. Differentiable in every
    tensor argument. Computes at the dtype of `x` whatever autocast says; what lies between is
    float32 (float64 for float64); kernels may round the operands of the first and the last product
    to bfloat16 where `x` is that.

    Args:
        x: `[B, C_in, H, W]`, float16, bfloat16, float32 or float64; any strides.
        qkv_weight: `[heads * 3 * head_dim, C_in, 1, 1]`, dtype of `x`.
        qkv_bias: `[heads * 3 * head_dim]` or None.
        depth_weights: per extra scale k, `[heads * 3 * head_dim, 1, k, k]` with k odd.
        depth_biases: per extra scale, `[heads * 3 * head_dim]`; or empty.
        group_weights: per extra scale, `[heads * 3 * head_dim, head_dim, 1, 1]`, 3 * heads groups.
        group_biases: per extra scale, `[heads * 3 * head_dim]`; or empty.
        proj_weight: `[C_out, heads * head_dim * (1 + scales), 1, 1]`.
        proj_bias: `[C_out]` or None.
        residual: `[B, C_out, H, W]` or None.
        head_dim: channels of one head's q.
        eps: added to the attention's denominator.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        `[B, C_out, H, W]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than `x`.
        ValueError: a shape, size or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors("multi_scale_attention", x=x, qkv_weight=qkv_weight, proj_weight=proj_weight)
    return _operator(
        x,
        qkv_weight,
        qkv_bias,
        list(depth_weights),
        list(depth_biases),
        list(group_weights),
        list(group_biases),
        proj_weight,
        proj_bias,
        residual,
        head_dim,
        eps,
        backend,
    )
