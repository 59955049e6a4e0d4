"""Public function and checks of `measure_masks`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from evsam_kernels.ops.checks import check_tensors
from evsam_kernels.ops.measure_masks.reference import MeasuredMasks, Sizes
from evsam_kernels.ops.registry import chosen_backend


@torch.no_grad()
def measure_masks(
    logits: Tensor,
    sizes: Sizes,
    *,
    threshold: float = 0.0,
    offset: float = 1.0,
    with_masks: bool = True,
    backend: str = "auto",
) -> MeasuredMasks:
    """Threshold mask logits at the size of the image, and measure the masks.

    What SAM's mask generator asks of every mask (arXiv 2304.02643, appendix B), without holding the
    upscaled logits. Every backend gives the same result: a mask with a pixel so close to a
    threshold that rounding decides is computed by the reference. It has no gradient.

    Args:
        logits: `[N, h, w]`, floating.
        sizes: how they are resized.
        threshold: pixels of a higher logit are in the mask.
        offset: how far the threshold is moved either way for `inner` and `outer`.
        with_masks: whether to return the masks themselves.
        backend: "auto", or the name of a backend, which then runs or raises.

    Raises:
        TypeError: `logits` is not a floating tensor.
        ValueError: a shape, size or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors("measure_masks", logits=logits)
    if not logits.is_floating_point():
        raise TypeError(f"measure_masks: logits must be floating, got {logits.dtype}")
    if not (logits.dim() == 3 and min(logits.shape[1:]) > 0):
        raise ValueError(
            f"measure_masks: logits must have shape [N, h, w], got {tuple(logits.shape)}"
        )
    sizes = Sizes(*sizes)
    if not (
        all(1 <= side <= most for side, most in zip(sizes.picture, sizes.frame, strict=True))
        and min(sizes.image) >= 1
    ):
        raise ValueError(
            f"measure_masks: sizes must be positive and the picture within the frame, got {sizes}"
        )
    if not offset >= 0:
        raise ValueError(f"measure_masks: offset must not be negative, got {offset}")
    name = chosen_backend("measure_masks", backend, logits.device.type, torch.float32)
    kernel: Callable[..., MeasuredMasks] = importlib.import_module(
        f"evsam_kernels.ops.measure_masks.{name}"
    ).measure_masks
    return kernel(logits, sizes, threshold, offset, with_masks)
