"""Public function, checks and registration of `upsample_add`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evsam_kernels.ops.checks import (
    check_map,
    check_operand,
    check_positive,
    check_tensors,
)
from evsam_kernels.ops.registry import register


def _output_shape(maps: Sequence[Tensor], height: int, width: int) -> tuple[int, int, int, int]:
    op = "upsample_add"
    if len(maps) <= 0:
        raise ValueError(f"{op}: maps must hold at least one map, got an empty list")
    check_positive(op, height=height, width=width)
    first = maps[0]
    for index, x in enumerate(maps):
        name = f"maps[{index}]"
        check_map(op, name, x)
        check_operand(op, name, x, (*first.shape[:2], *x.shape[2:]), first)
    return (first.shape[0], first.shape[1], height, width)


_operator = register("upsample_add", "Tensor[] maps, SymInt height, SymInt width", _output_shape)


def upsample_add(maps: Sequence[Tensor], size: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """Resize every map to `size` by bicubic interpolation and add them up.

    The merge in EfficientViT-SAM's neck. Interpolation as `torch.nn.functional.interpolate` does it
    with `mode="bicubic", align_corners=False`. Differentiable in every map. Computes at the dtype
    of the maps whatever autocast says, with float32 sums (float64 for float64).

    Args:
        maps: one or more `[B, C, h, w]`, each with its own h and w, float16, bfloat16, float32 or
            float64, all of one dtype; any strides.
        size: `(height, width)` of the result, in pixels.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        `[B, C, height, width]` in `torch.channels_last`, dtype of the maps.

    Raises:
        TypeError: a map is not a floating tensor, or the dtypes differ.
        ValueError: no map, or a shape, size or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors("upsample_add", **{f"maps[{index}]": x for index, x in enumerate(maps)})
    height, width = size
    return _operator(list(maps), height, width, backend)
