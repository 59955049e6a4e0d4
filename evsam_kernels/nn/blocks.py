"""The convolution blocks of EfficientViT, trainable, and the containers that combine blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from evsam_kernels.nn.layers import ConvLayer, build_activation

T = TypeVar("T")

Norms = str | None | tuple[str | None, ...]
Activations = str | None | tuple[str | None, ...]
Biases = bool | tuple[bool, ...]


def per_conv(setting: T | Sequence[T], convs: int) -> tuple[T, ...]:
    """One value per convolution: a single value repeated, a tuple padded with its last."""
    values = tuple(setting) if isinstance(setting, (list, tuple)) else (setting,)
    return (*values, *[values[-1]] * (convs - len(values)))


def _mid_channels(in_channels: int, mid_channels: int | None, expand_ratio: float) -> int:
    return round(in_channels * expand_ratio) if mid_channels is None else mid_channels


class DSConv(nn.Module):
    """Depthwise k x k (carries the stride), then 1x1: `[B, C_in, H, W]` -> `[B, C_out, H', W']`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        use_bias: Biases = False,
        norm: Norms = ("bn2d", "bn2d"),
        act_func: Activations = ("relu6", None),
    ) -> None:
        super().__init__()
        biases, norms, acts = per_conv(use_bias, 2), per_conv(norm, 2), per_conv(act_func, 2)
        self.depth_conv = ConvLayer(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            groups=in_channels,
            use_bias=biases[0],
            norm=norms[0],
            act_func=acts[0],
        )
        self.point_conv = ConvLayer(
            in_channels, out_channels, 1, use_bias=biases[1], norm=norms[1], act_func=acts[1]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(x))


class MBConv(nn.Module):
    """1x1, depthwise k x k (carries the stride), 1x1: `[B, C_in, H, W]` -> `[B, C_out, H', W']`.

    arXiv 1801.04381. The hidden width is `round(in_channels * expand_ratio)` unless given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        mid_channels: int | None = None,
        expand_ratio: float = 6,
        use_bias: Biases = False,
        norm: Norms = ("bn2d", "bn2d", "bn2d"),
        act_func: Activations = ("relu6", "relu6", None),
    ) -> None:
        super().__init__()
        biases, norms, acts = per_conv(use_bias, 3), per_conv(norm, 3), per_conv(act_func, 3)
        mid_channels = _mid_channels(in_channels, mid_channels, expand_ratio)
        self.inverted_conv = ConvLayer(
            in_channels, mid_channels, 1, use_bias=biases[0], norm=norms[0], act_func=acts[0]
        )
        self.depth_conv = ConvLayer(
            mid_channels,
            mid_channels,
            kernel_size,
            stride,
            groups=mid_channels,
            use_bias=biases[1],
            norm=norms[1],
            act_func=acts[1],
        )
        self.point_conv = ConvLayer(
            mid_channels, out_channels, 1, use_bias=biases[2], norm=norms[2], act_func=acts[2]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class FusedMBConv(nn.Module):
    """k x k (carries the stride), then 1x1: `[B, C_in, H, W]` -> `[B, C_out, H', W']`.

    arXiv 2104.00298. The hidden width is `round(in_channels * expand_ratio)` unless given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        mid_channels: int | None = None,
        expand_ratio: float = 6,
        groups: int = 1,
        use_bias: Biases = False,
        norm: Norms = ("bn2d", "bn2d"),
        act_func: Activations = ("relu6", None),
    ) -> None:
        super().__init__()
        biases, norms, acts = per_conv(use_bias, 2), per_conv(norm, 2), per_conv(act_func, 2)
        mid_channels = _mid_channels(in_channels, mid_channels, expand_ratio)
        self.spatial_conv = ConvLayer(
            in_channels,
            mid_channels,
            kernel_size,
            stride,
            groups=groups,
            use_bias=biases[0],
            norm=norms[0],
            act_func=acts[0],
        )
        self.point_conv = ConvLayer(
            mid_channels, out_channels, 1, use_bias=biases[1], norm=norms[1], act_func=acts[1]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.spatial_conv(x))


class ResBlock(nn.Module):
    """k x k (carries the stride), then k x k: `[B, C_in, H, W]` -> `[B, C_out, H', W']`.

    The hidden width is `round(in_channels * expand_ratio)` unless given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        mid_channels: int | None = None,
        expand_ratio: float = 1,
        use_bias: Biases = False,
        norm: Norms = ("bn2d", "bn2d"),
        act_func: Activations = ("relu6", None),
    ) -> None:
        super().__init__()
        biases, norms, acts = per_conv(use_bias, 2), per_conv(norm, 2), per_conv(act_func, 2)
        mid_channels = _mid_channels(in_channels, mid_channels, expand_ratio)
        self.conv1 = ConvLayer(
            in_channels,
            mid_channels,
            kernel_size,
            stride,
            use_bias=biases[0],
            norm=norms[0],
            act_func=acts[0],
        )
        self.conv2 = ConvLayer(
            mid_channels,
            out_channels,
            kernel_size,
            use_bias=biases[1],
            norm=norms[1],
            act_func=acts[1],
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class ResidualBlock(nn.Module):
    """post_act(main(pre_norm(x)) + shortcut(x)).

    Without `main` it returns its input; without `shortcut` it returns the main branch alone, and
    `post_act` is not applied.
    """

    def __init__(
        self,
        main: nn.Module | None,
        shortcut: nn.Module | None,
        post_act: str | None = None,
        pre_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.main = main
        self.shortcut = shortcut
        self.post_act = build_activation(post_act)

    def forward_main(self, x: Tensor) -> Tensor:
        """The main branch alone."""
        if self.main is None:
            return x
        return self.main(x if self.pre_norm is None else self.pre_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.main is None or self.shortcut is None:
            return self.forward_main(x)
        y = self.forward_main(x) + self.shortcut(x)
        return y if self.post_act is None else self.post_act(y)


class OpSequential(nn.Module):
    """Applies modules in turn; entries that are None are left out. Attribute `op_list`."""

    def __init__(self, op_list: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(op for op in op_list if op is not None)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x
