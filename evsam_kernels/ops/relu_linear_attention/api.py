"""Public function, checks and registration of `relu_linear_attention`."""

from __future__ import annotations

from torch import Tensor

from evsam_kernels.ops.checks import check_map, check_positive, check_tensors
from evsam_kernels.ops.registry import register


def _output_shape(qkv: Tensor, head_dim: int, eps: float) -> tuple[int, int, int, int]:
    op = "relu_linear_attention"
    check_positive(op, head_dim=head_dim)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    check_map(op, "qkv", qkv)
    batch, channels, height, width = qkv.shape
    if channels % (3 * head_dim) != 0:
        raise ValueError(
            f"{op}: qkv must have heads * 3 * head_dim channels with head_dim {head_dim}, "
            f"got {channels} channels"
        )
    return (batch, channels // 3, height, width)


_operator = register("relu_linear_attention", "Tensor qkv, int head_dim, float eps", _output_shape)


def relu_linear_attention(
    qkv: Tensor, *, head_dim: int, eps: float = 1e-15, backend: str = "auto"
) -> Tensor:
    """relu(q) (relu(k)^T v) / (relu(q) sum relu(k) + eps), per head, over the pixels of a map.

    Equation 1 of EfficientViT (arXiv 2205.14756). Differentiable. Computes at the dtype of `qkv`
    whatever autocast says, with float32 sums (float64 for float64), so that a finite float16 input
    gives a finite output.

    Args:
        qkv: `[B, heads * 3 * head_dim, H, W]`, float16, bfloat16, float32 or float64; each run of
            `3 * head_dim` channels is one head's q, k and v. Any strides.
        head_dim: channels of one head's q.
        eps: added to the denominator; a pixel whose relu(q) meets no relu(k) gives 0.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        `[B, heads * head_dim, H, W]` in `torch.channels_last`, dtype of `qkv`.

    Raises:
        TypeError: `qkv` is not a floating tensor.
        ValueError: a shape, size or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors("relu_linear_attention", qkv=qkv)
    return _operator(qkv, head_dim, eps, backend)
