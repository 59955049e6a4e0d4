"""Public function, checks and registration of `layer_norm_2d`."""

from __future__ import annotations

from torch import Tensor

from evsam_kernels.ops.checks import check_map, check_operand, check_tensors
from evsam_kernels.ops.registry import register


def _output_shape(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[int, ...]:
    op = "layer_norm_2d"
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    check_map(op, "x", x)
    channels = x.shape[1]
    check_operand(op, "weight", weight, (channels,), x, or_float32=True)
    check_operand(op, "bias", bias, (channels,), x, or_float32=True)
    return tuple(x.shape)


_operator = register(
    "layer_norm_2d", "Tensor x, Tensor? weight, Tensor? bias, float eps", _output_shape
)


def layer_norm_2d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm (arXiv 1607.06450) over the channels of every pixel, biased variance.

    Differentiable in every tensor argument. Computes at the dtype of `x` whatever autocast says,
    with statistics in float32 (float64 for float64), so that a finite float16 input gives a finite
    output.

    Args:
        x: `[B, C, H, W]`, float16, bfloat16, float32 or float64; any strides.
        weight: `[C]`, dtype of `x` or float32; or None.
        bias: `[C]`, dtype of `x` or float32; or None.
        eps: added to the variance.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        `[B, C, H, W]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that is not accepted.
        ValueError: a shape or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors("layer_norm_2d", x=x)
    return _operator(x, weight, bias, eps, backend)
