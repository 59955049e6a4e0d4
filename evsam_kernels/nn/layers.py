"""The layers every block is made of: convolution, activation, normalisation, resizing."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from evsam_kernels import ops
from evsam_kernels.ops.layout import accumulation_dtype

ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of every pixel: `[B, C, H, W]` -> `[B, C, H, W]`.

    Constructor and state as `torch.nn.LayerNorm`; statistics in float32 for every dtype but
    float64, so that half precision does not overflow.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm_2d(x, self.weight, self.bias, eps=self.eps)


NORM_MODULES: dict[str, Callable[[int], nn.Module]] = {
    "bn2d": nn.BatchNorm2d,
    "ln2d": LayerNorm2d,
}


def build_activation(name: str | None) -> nn.Module | None:
    """A new activation module, or None for None.

    Raises:
        ValueError: the name is unknown.
    """
    if name is None:
        return None
    if name not in ACTIVATION_MODULES:
        raise ValueError(
            f"act_func must be None or one of {', '.join(map(repr, ACTIVATION_MODULES))}, "
            f"got {name!r}"
        )
    return ACTIVATION_MODULES[name]()


def build_norm(name: str | None, num_features: int) -> nn.Module | None:
    """A new normalisation over `num_features` channels, or None for None.

    Raises:
        ValueError: the name is unknown.
    """
    if name is None:
        return None
    if name not in NORM_MODULES:
        raise ValueError(
            f"norm must be None or one of {', '.join(map(repr, NORM_MODULES))}, got {name!r}"
        )
    return NORM_MODULES[name](num_features)


class ConvLayer(nn.Module):
    """Dropout, convolution, normalisation and activation, each but the convolution optional.

    `[B, in_channels, H, W]` -> `[B, out_channels, H', W']` with `H' = (H - 1) // stride + 1`: zero
    padding of `kernel_size // 2 * dilation`. Attributes `dropout`, `conv`, `norm`, `act`; a missing
    one is None.

    Raises:
        ValueError: `kernel_size` is even, or `norm` or `act_func` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        dropout: float = 0,
        norm: str | None = "bn2d",
        act_func: str | None = "relu",
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.dropout = nn.Dropout2d(dropout) if dropout > 0 else None
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2 * dilation,
            dilation=dilation,
            groups=groups,
            bias=use_bias,
        )
        self.norm = build_norm(norm, out_channels)
        self.act = build_activation(act_func)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.dropout, self.conv, self.norm, self.act):
            if layer is not None:
                x = layer(x)
        return x


class UpSampleLayer(nn.Module):
    """Resize the map: `[B, C, H, W]` -> `[B, C, *size]`, or by `factor` where no size is given.

    Half precision is interpolated in float32 and rounded once to the dtype of the input.

    Raises:
        ValueError: `mode` is unknown.
    """

    _WITH_CORNERS = ("bilinear", "bicubic")
    _WITHOUT_CORNERS = ("nearest", "area")

    def __init__(
        self,
        mode: str = "bicubic",
        size: int | tuple[int, int] | list[int] | None = None,
        factor: float = 2,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        accepted = (*self._WITH_CORNERS, *self._WITHOUT_CORNERS)
        if mode not in accepted:
            raise ValueError(f"mode must be one of {', '.join(map(repr, accepted))}, got {mode!r}")
        if isinstance(size, int):
            size = (size, size)
        self.mode = mode
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.factor = factor if size is None else None
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) == self.size or self.factor == 1:
            return x
        return F.interpolate(
            x.to(accumulation_dtype(x.dtype)),
            size=self.size,
            scale_factor=self.factor,
            mode=self.mode,
            align_corners=self.align_corners if self.mode in self._WITH_CORNERS else None,
        ).to(x.dtype)


class IdentityLayer(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x
