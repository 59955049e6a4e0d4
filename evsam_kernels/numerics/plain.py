"""Modules in PyTorch's own operations alone: what the oracle computes, and what peers are given.

The modules of the package call the package's operations. A peer must get none of them: it could
not look inside, and would be timed with our kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_kernels.nn import LayerNorm2d, LiteMLA
from evsam_kernels.numerics.budget import Errors, budget, measure
from evsam_kernels.ops.registry import formula

_relu_linear_attention = formula("relu_linear_attention")


class _PlainLayerNorm2d(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return normalised.permute(0, 3, 1, 2)


class _PlainLiteMLA(LiteMLA):
    def _attend(self, qkv: Tensor) -> Tensor:
        return _relu_linear_attention(qkv, self.dim, self.eps)


class _WideLayerNorm2d(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(
            x.permute(0, 2, 3, 1).float(),
            self.normalized_shape,
            self.weight.float(),
            self.bias.float(),
            self.eps,
        )
        return normalised.to(x.dtype).permute(0, 3, 1, 2)


class _WideLiteMLA(LiteMLA):
    def _attend(self, qkv: Tensor) -> Tensor:
        return _relu_linear_attention(qkv.float(), self.dim, self.eps).to(qkv.dtype)


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    LayerNorm2d: _PlainLayerNorm2d,
    LiteMLA: _PlainLiteMLA,
}
_WIDE: dict[type[nn.Module], type[nn.Module]] = {
    LayerNorm2d: _WideLayerNorm2d,
    LiteMLA: _WideLiteMLA,
}


def plain(module: nn.Module, *, wide: bool = False) -> nn.Module:
    """A copy of `module` that computes the same without any operation of the package.

    Args:
        module: to copy.
        wide: whether normalisation and attention, whose sums overflow float16, compute at float32.
            They take and return the dtype of the module all the same.
    """
    module = copy.deepcopy(module).requires_grad_(False)
    replacements = _WIDE if wide else _PLAIN
    for submodule in module.modules():
        if type(submodule) in replacements:
            submodule.__class__ = replacements[type(submodule)]
    return module


def plain_channels_last(
    module: nn.Module, dtype: torch.dtype, device: str = "cpu", *, wide: bool = False
) -> nn.Module:
    """`plain(module)` at `dtype`, its weights in the layout that the package's own have."""
    # torch.nn.Module.to() is declared without memory_format.
    copied: Any = plain(module, wide=wide)
    converted: nn.Module = copied.to(device, dtype, memory_format=torch.channels_last)
    return converted


def evaluate(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    wide: bool = False,
) -> Tensor:
    """The output of the plain form of `module`, computed at `dtype` on `device`, on the CPU.

    Channels last, as `fuse()` and the eager contestant compute it: at float32 the layout decides
    in what order PyTorch sums. Picture by picture, as many at float64 may not fit.
    """
    one_by_one = len({len(x) for x in inputs}) == 1
    pictures = zip(*(x.split(1) for x in inputs), strict=True) if one_by_one else [inputs]
    with torch.inference_mode():
        computed = plain_channels_last(module, dtype, device, wide=wide)
        outputs = [
            computed(*(x.to(device, dtype, memory_format=torch.channels_last) for x in picture))
            for picture in pictures
        ]
        return torch.cat([output.cpu() for output in outputs])


def yardstick(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    oracle: Tensor,
    device: str = "cpu",
) -> tuple[Tensor, Errors, str]:
    """What plain PyTorch makes of a module at a dtype: the output, its errors, how it was computed.

    Everything at the dtype; where that overflows or would let zeros pass, the same with
    normalisation and attention at float32; where that is of no use either, all at float32, rounded.

    Args:
        module: in eval mode.
        inputs: `[B, C, H, W]` each.
        dtype: of inputs, weights and output.
        oracle: the output at float64.
        device: that computes.
    """
    name = str(dtype).removeprefix("torch.")
    ways = (
        (name, dtype, False),
        (f"{name}, float32 in normalisation and attention", dtype, True),
        (f"float32 rounded to {name}", torch.float32, False),
    )
    for how, computed_at, wide in ways:
        found = evaluate(module, inputs, computed_at, device, wide=wide).to(dtype)
        errors = measure(found, oracle)
        if budget(errors, dtype).frobenius < 1:
            return found, errors, how
    return found, errors, how
