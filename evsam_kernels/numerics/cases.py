"""What each operation is validated on: layers of the models, odd sizes, extreme and awkward values.

A case is a name and the settings of a builder; its values follow from its name alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evsam_kernels.ops.registry import formula, map_tensors

Operands = dict[str, Any]
"""An operation's operands by the names in its schema: tensors, lists of tensors, settings."""


def map_operands(function: Callable[[Tensor], Tensor], operands: Operands) -> Operands:
    """Apply `function` to every tensor among the operands."""
    return {name: map_tensors(function, value) for name, value in operands.items()}


_LEAST_FOR_ATTENTION = 2.0**-22
"""Where products of two values fall below eps, attention is 0 at every precision."""

INPUT_KINDS = ("random", "large", "tiny", "constant", "alternating", "outlier")


class Draw:
    """Seeded float64 values for one case, at magnitudes that suit the storage dtype.

    Attributes:
        large: values whose products and sums leave float16, far out for the other dtypes.
        tiny: near the smallest normal number.
        epsilon: spacing of the numbers just above 1.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        # float64 errors are judged by float32 ones (`budget.py`), so its values fit float32.
        limits = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
        self.large = 2.0**12 if dtype == torch.float16 else 2.0**28
        self.tiny = 8 * limits.smallest_normal
        self.epsilon = limits.eps

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed values of variance 1."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def map(self, shape: Sequence[int], kind: str = "random") -> Tensor:
        """A feature map `[B, C, H, W]` in `torch.channels_last`, to be scaled by `magnitude`."""
        values = self.normal(*shape)
        if kind == "constant":
            values = torch.full_like(values, 0.75)
        elif kind == "alternating":
            positions = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
            values = (1 + values / 16) * (1 - 2 * (sum(positions) % 2))
        elif kind == "outlier":
            values.view(-1)[values.numel() // 3] = 2.0**12
        return values.contiguous(memory_format=torch.channels_last)

    def magnitude(self, kind: str) -> float:
        """How large the values of a map of a kind in `INPUT_KINDS` are."""
        return {"large": self.large, "tiny": self.tiny}.get(kind, 1.0)

    def weight(self, *shape: int, gain: float = 1.0, positive: bool = False) -> Tensor:
        """A convolution weight that keeps the variance of its input, times `gain`."""
        values = self.normal(*shape) * (gain / (shape[1] * shape[2] * shape[3]) ** 0.5)
        return values.abs() if positive else values


def _optional(present: bool, produce: Callable[[], Tensor]) -> Tensor | None:
    return produce() if present else None


def _size_after(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return ((size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1)


def _conv_act(
    draw: Draw,
    *,
    channels: tuple[int, int] = (16, 24),
    size: tuple[int, int] = (7, 9),
    batch: int = 2,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    bias: bool = True,
    residual: bool = False,
    kind: str = "random",
    positive: bool = False,
) -> Operands:
    in_channels, out_channels = channels
    magnitude = draw.magnitude(kind)
    taken_back = kind == "large" and residual
    operands: Operands = {
        "x": draw.map((batch, in_channels, *size), kind) * magnitude,
        "weight": draw.weight(
            out_channels,
            in_channels // groups,
            kernel,
            kernel,
            gain=6 if taken_back else 1,
            positive=positive,
        ),
        "bias": _optional(bias, lambda: draw.normal(out_channels) * magnitude),
        "residual": _optional(
            residual,
            lambda: draw.map((batch, out_channels, *_size_after(size, stride))) * magnitude,
        ),
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
    }
    if taken_back:
        # The convolution leaves float16; the residual takes most of it back.
        convolved = formula("conv_act")(**{**operands, "residual": None})
        limit = 14 * magnitude
        operands["residual"] = (-0.75 * convolved).clamp(-limit, limit)
    return operands


def _fused_mbconv(
    draw: Draw,
    *,
    channels: tuple[int, int, int] = (16, 40, 16),
    size: tuple[int, int] = (7, 9),
    batch: int = 2,
    kernel: int = 3,
    stride: int = 1,
    activation: str | None = "gelu",
    bias: tuple[bool, bool] = (True, True),
    residual: bool = False,
    kind: str = "random",
) -> Operands:
    in_channels, mid_channels, out_channels = channels
    magnitude = draw.magnitude(kind)
    # The expanded tensor leaves float16, the result does not.
    gain = 16 if kind == "large" else 1
    return {
        "x": draw.map((batch, in_channels, *size), kind) * magnitude,
        "spatial_weight": draw.weight(mid_channels, in_channels, kernel, kernel, gain=gain),
        "spatial_bias": _optional(bias[0], lambda: draw.normal(mid_channels) * magnitude),
        "point_weight": draw.weight(out_channels, mid_channels, 1, 1, gain=1 / gain),
        "point_bias": _optional(bias[1], lambda: draw.normal(out_channels) * magnitude),
        "residual": _optional(
            residual,
            lambda: draw.map((batch, out_channels, *_size_after(size, stride))) * magnitude,
        ),
        "stride": stride,
        "activation": activation,
    }


def _mbconv(
    draw: Draw,
    *,
    channels: tuple[int, int, int] = (16, 40, 16),
    size: tuple[int, int] = (7, 9),
    batch: int = 2,
    kernel: int = 3,
    stride: int = 1,
    activation: str | None = "gelu",
    bias: tuple[bool, bool, bool] = (True, True, True),
    residual: bool = False,
    kind: str = "random",
) -> Operands:
    in_channels, mid_channels, out_channels = channels
    magnitude = draw.magnitude(kind)
    gain = 16 if kind == "large" else 1  # As in _fused_mbconv.
    return {
        "x": draw.map((batch, in_channels, *size), kind) * magnitude,
        "expand_weight": draw.weight(mid_channels, in_channels, 1, 1, gain=gain),
        "expand_bias": _optional(bias[0], lambda: draw.normal(mid_channels) * magnitude),
        "depth_weight": draw.weight(mid_channels, 1, kernel, kernel),
        "depth_bias": _optional(bias[1], lambda: draw.normal(mid_channels) * magnitude),
        "point_weight": draw.weight(out_channels, mid_channels, 1, 1, gain=1 / gain),
        "point_bias": _optional(bias[2], lambda: draw.normal(out_channels) * magnitude),
        "residual": _optional(
            residual,
            lambda: draw.map((batch, out_channels, *_size_after(size, stride))) * magnitude,
        ),
        "stride": stride,
        "activation": activation,
    }


def _relu_linear_attention(
    draw: Draw,
    *,
    heads: int = 2,
    head_dim: int = 16,
    size: tuple[int, int] = (7, 9),
    batch: int = 2,
    eps: float = 1e-15,
    kind: str = "random",
    silent_keys: bool = False,
    silent_queries: bool = False,
) -> Operands:
    magnitude = max(draw.magnitude(kind), _LEAST_FOR_ATTENTION)
    qkv = draw.map((batch, heads * 3 * head_dim, *size), kind) * magnitude
    q, k, _ = qkv.view(batch, heads, 3 * head_dim, *size).split(head_dim, dim=2)
    if silent_keys:
        k[:, 0] = -k[:, 0].abs()
    if silent_queries:
        q[..., ::2] = -q[..., ::2].abs()
    return {"qkv": qkv, "head_dim": head_dim, "eps": eps}


def _multi_scale_attention(
    draw: Draw,
    *,
    channels: tuple[int, int] = (24, 24),
    heads: int = 2,
    head_dim: int = 16,
    scales: tuple[int, ...] = (5,),
    size: tuple[int, int] = (7, 9),
    batch: int = 2,
    bias: tuple[bool, bool] = (False, False),
    scale_bias: bool = False,
    residual: bool = True,
    eps: float = 1e-15,
    kind: str = "random",
) -> Operands:
    in_channels, out_channels = channels
    width = heads * 3 * head_dim
    gain = 16 if kind == "large" else 1  # q, k and v leave float16, the result does not.
    magnitude = max(draw.magnitude(kind), _LEAST_FOR_ATTENTION)
    return {
        "x": draw.map((batch, in_channels, *size), kind) * magnitude,
        "qkv_weight": draw.weight(width, in_channels, 1, 1, gain=gain),
        "qkv_bias": _optional(bias[0], lambda: draw.normal(width) * magnitude),
        "depth_weights": [draw.weight(width, 1, kernel, kernel) for kernel in scales],
        "depth_biases": [draw.normal(width) * magnitude for _ in scales] if scale_bias else [],
        "group_weights": [draw.weight(width, head_dim, 1, 1) for _ in scales],
        "group_biases": [draw.normal(width) * magnitude for _ in scales] if scale_bias else [],
        "proj_weight": draw.weight(
            out_channels, heads * head_dim * (1 + len(scales)), 1, 1, gain=1 / gain
        ),
        "proj_bias": _optional(bias[1], lambda: draw.normal(out_channels) * magnitude),
        "residual": _optional(residual, lambda: draw.map((batch, out_channels, *size)) * magnitude),
        "head_dim": head_dim,
        "eps": eps,
    }


def _layer_norm_2d(
    draw: Draw,
    *,
    channels: int = 24,
    size: tuple[int, int] = (7, 9),
    batch: int = 2,
    weight: bool = True,
    bias: bool = True,
    float32_affine: bool = False,
    eps: float = 1e-6,
    kind: str = "random",
    offset: float = 0.0,
) -> Operands:
    x = draw.map((batch, channels, *size), kind) * draw.magnitude(kind)
    if kind == "large":
        x = (x * 4).clamp(-14 * draw.large, 14 * draw.large)
    if kind == "constant":
        # A constant of its own per pixel, and a perturbation of a few steps of the dtype.
        x = draw.normal(batch, 1, *size) + x * draw.normal(*x.shape) * 16 * draw.epsilon
    # At an offset of 1 a standard deviation is about 8 steps of the dtype.
    x = x + offset / (8 * draw.epsilon)
    affine = torch.float32 if float32_affine else torch.float64
    return {
        "x": x.contiguous(memory_format=torch.channels_last),
        "weight": _optional(weight, lambda: draw.normal(channels).to(affine)),
        "bias": _optional(bias, lambda: draw.normal(channels).to(affine)),
        "eps": eps,
    }


def _upsample_add(
    draw: Draw,
    *,
    channels: int = 8,
    inputs: Sequence[tuple[int, int]] = ((4, 4), (8, 8), (16, 16)),
    size: tuple[int, int] = (16, 16),
    batch: int = 2,
    kind: str = "random",
    opposite: bool = False,
) -> Operands:
    magnitude = draw.magnitude(kind)
    maps = [draw.map((batch, channels, *shape), kind) * magnitude for shape in inputs]
    if opposite:
        # Overshoots its values, by more than float16 holds, and is nearly taken back by the last.
        peak = 15.5 * draw.large
        first = draw.map((batch, channels, *inputs[0]), "alternating").sign() * peak
        noise = draw.map((batch, channels, *inputs[0])) * peak / 64
        maps = [first, (noise - 0.9 * first)]
    return {"maps": maps, "height": size[0], "width": size[1]}


_BUILDERS: dict[str, Callable[..., Operands]] = {
    "conv_act": _conv_act,
    "fused_mbconv": _fused_mbconv,
    "mbconv": _mbconv,
    "relu_linear_attention": _relu_linear_attention,
    "multi_scale_attention": _multi_scale_attention,
    "layer_norm_2d": _layer_norm_2d,
    "upsample_add": _upsample_add,
}


@dataclass(frozen=True)
class Case:
    """One set of operands of one operation.

    Attributes:
        op: name of the operation.
        name: says what is particular; the values follow from it.
        settings: of the operation's builder, `_<op>` above.
        quick: computed in milliseconds, so that its gradients are checked too.
    """

    op: str
    name: str
    settings: dict[str, Any]
    quick: bool = True

    def operands(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Operands:
        """The operands, tensors rounded to the storage dtype `dtype` and moved to `device`.

        Float32 tensors that a builder makes stay float32 at every dtype.
        """
        draw = Draw(zlib.crc32(f"{self.op}: {self.name}".encode()), dtype)
        return map_operands(
            lambda value: value.to(device, dtype if value.dtype == torch.float64 else value.dtype),
            _BUILDERS[self.op](draw, **self.settings),
        )


_ACTIVATIONS = ("relu", "relu6", "hswish", "silu", "gelu")
_KINDS = {kind: {"kind": kind} for kind in INPUT_KINDS}

# Per operation: the quick cases, and the others, layers of the models at a reduced resolution.
_SETTINGS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]] = {
    "conv_act": (
        {
            **_KINDS,
            **{f"activation {name}": {"activation": name} for name in _ACTIVATIONS},
            "large sum taken back by the residual": {
                "channels": (32, 32),
                "size": (16, 16),
                "kind": "large",
                "residual": True,
            },
            "cancelling products": {"kind": "alternating", "positive": True},
            "residual after the activation": {"residual": True, "activation": "gelu"},
            "residual, stride 2": {"residual": True, "stride": 2},
            "no bias": {"bias": False},
            "stride 2, even size": {"stride": 2, "size": (8, 10)},
            "stride 2, odd size": {"stride": 2, "size": (7, 9)},
            "stride 3, 5x5": {"stride": 3, "kernel": 5, "size": (11, 10)},
            "1x1": {"kernel": 1, "activation": "hswish"},
            "1x1, stride 2": {"kernel": 1, "stride": 2},
            "7x7": {"kernel": 7, "size": (5, 12)},
            "dilation 2": {"dilation": 2},
            "groups": {"groups": 4, "channels": (16, 24)},
            "depthwise 5x5": {"groups": 16, "channels": (16, 16), "kernel": 5},
            "depthwise 3x3, stride 2": {"groups": 16, "channels": (16, 16), "stride": 2},
            "one pixel": {"size": (1, 1)},
            "one channel": {"channels": (1, 1), "batch": 1},
            "one row": {"size": (1, 13)},
            "odd channels": {"channels": (13, 5), "activation": "gelu"},
            "32 channels, odd size": {"channels": (32, 40), "residual": True},
            "32 channels, stride 2, odd size": {"channels": (32, 40), "size": (13, 7), "stride": 2},
        },
        {
            **{
                f"large map, {kind}": {"channels": (64, 40), "size": (33, 35), "kind": kind}
                for kind in INPUT_KINDS
            },
            "large map, large sum taken back by the residual": {
                "channels": (64, 40),
                "size": (32, 33),
                "kind": "large",
                "residual": True,
            },
            "large map, 32 channels": {"channels": (32, 40), "size": (33, 35)},
            "large map, one picture": {"channels": (64, 64), "size": (40, 40), "batch": 1},
            "large map, stride 2": {"channels": (64, 40), "size": (35, 33), "stride": 2},
            "L0 stem": {"channels": (3, 32), "size": (64, 64), "stride": 2, "activation": "gelu"},
            "L0 residual block, first": {
                "channels": (32, 32),
                "size": (32, 32),
                "activation": "gelu",
            },
            "L0 residual block, second": {
                "channels": (32, 32),
                "size": (32, 32),
                "residual": True,
            },
            "L0 neck, stage 4": {"channels": (512, 256), "size": (16, 16), "kernel": 1},
            "L0 neck, stage 2": {"channels": (128, 256), "size": (24, 24), "kernel": 1},
            "L0 neck, output": {"channels": (256, 256), "size": (16, 16), "kernel": 1},
            "XL0 neck, stage 5": {"channels": (1024, 256), "size": (16, 16), "kernel": 1},
        },
    ),
    "fused_mbconv": (
        {
            **_KINDS,
            **{f"activation {name}": {"activation": name} for name in _ACTIVATIONS},
            "no activation": {"activation": None},
            "residual": {"residual": True},
            "no biases": {"bias": (False, False), "residual": True},
            "first bias only": {"bias": (True, False)},
            "stride 2, even size": {"stride": 2, "size": (8, 10)},
            "stride 2, odd size, residual": {"stride": 2, "residual": True},
            "stride 3": {"stride": 3, "size": (10, 11)},
            "1x1": {"kernel": 1},
            "5x5": {"kernel": 5},
            "7x7": {"kernel": 7},
            "one pixel": {"size": (1, 1)},
            "one channel": {"channels": (1, 1, 1), "batch": 1},
            "odd channels": {"channels": (13, 27, 5)},
            "32 channels, odd size": {"channels": (32, 72, 32), "residual": True},
            "32 channels, stride 2, odd size": {
                "channels": (32, 72, 40),
                "size": (13, 7),
                "stride": 2,
            },
        },
        {
            **{
                f"large map, {kind}": {"channels": (96, 72, 40), "size": (33, 35), "kind": kind}
                for kind in INPUT_KINDS
            },
            "large map, one picture": {"channels": (128, 256, 64), "size": (40, 40), "batch": 1},
            "large map, residual": {
                "channels": (96, 72, 64),
                "size": (32, 33),
                "residual": True,
            },
            "large map, many channels": {
                "channels": (96, 192, 128),
                "size": (33, 34),
                "residual": True,
            },
            "many channels, stride 2": {"channels": (32, 128, 192), "size": (13, 9), "stride": 2},
            "L0 stage 1, strided": {"channels": (32, 512, 64), "size": (32, 32), "stride": 2},
            "L0 stage 1": {"channels": (64, 256, 64), "size": (16, 16), "residual": True},
            "L0 stage 1, large map, outlier": {
                "channels": (64, 256, 64),
                "size": (32, 32),
                "kind": "outlier",
                "batch": 1,
            },
            "L0 stage 2, strided": {"channels": (64, 1024, 128), "size": (16, 16), "stride": 2},
            "L0 stage 2": {"channels": (128, 512, 128), "size": (12, 12), "residual": True},
            "L0 neck": {"channels": (256, 256, 256), "size": (12, 12), "residual": True},
            "XL0 stage 3, strided": {
                "channels": (128, 2048, 256),
                "size": (10, 10),
                "stride": 2,
                "batch": 1,
            },
            "XL0 neck": {
                "channels": (256, 1024, 256),
                "size": (8, 8),
                "residual": True,
                "batch": 1,
            },
        },
    ),
    "mbconv": (
        {
            **_KINDS,
            **{f"activation {name}": {"activation": name} for name in _ACTIVATIONS},
            "no activation": {"activation": None},
            "residual": {"residual": True},
            "no biases": {"bias": (False, False, False), "residual": True},
            "last bias absent": {"bias": (True, True, False)},
            "stride 2, even size": {"stride": 2, "size": (8, 10)},
            "stride 2, odd size, residual": {"stride": 2, "residual": True},
            "stride 3": {"stride": 3, "size": (10, 11)},
            "1x1": {"kernel": 1},
            "5x5": {"kernel": 5},
            "7x7": {"kernel": 7},
            "one pixel": {"size": (1, 1)},
            "one channel": {"channels": (1, 1, 1), "batch": 1},
            "odd channels": {"channels": (13, 27, 5)},
        },
        {
            **{
                f"many channels, {kind}": {
                    "channels": (128, 256, 128),
                    "size": (12, 12),
                    "kind": kind,
                }
                for kind in INPUT_KINDS
            },
            "L0 stage 3, strided": {"channels": (128, 2048, 256), "size": (12, 12), "stride": 2},
            "L0 stage 3": {"channels": (256, 1024, 256), "size": (12, 12), "residual": True},
            "L0 stage 4, strided": {"channels": (256, 4096, 512), "size": (8, 8), "stride": 2},
            "L0 stage 4": {"channels": (512, 3072, 512), "size": (8, 8), "residual": True},
            "XL0 stage 5, strided": {
                "channels": (512, 12288, 1024),
                "size": (4, 4),
                "stride": 2,
                "batch": 1,
            },
            "XL0 stage 5": {
                "channels": (1024, 6144, 1024),
                "size": (5, 5),
                "residual": True,
                "batch": 1,
            },
        },
    ),
    "relu_linear_attention": (
        {
            **_KINDS,
            **{f"head dim {dim}": {"head_dim": dim, "size": (12, 11)} for dim in (8, 16, 32, 64)},
            "odd head dim": {"head_dim": 13, "heads": 3},
            "fewer tokens than channels": {"head_dim": 32, "size": (5, 6)},
            "fewer tokens, large": {"head_dim": 32, "size": (5, 6), "kind": "large"},
            "as many tokens as channels": {"head_dim": 16, "size": (4, 4)},
            "one token more than channels": {"head_dim": 16, "size": (1, 17)},
            "one token": {"size": (1, 1)},
            "one head of one channel": {"heads": 1, "head_dim": 1, "batch": 1},
            "one head without keys": {"silent_keys": True},
            "one head without keys, few tokens": {"silent_keys": True, "size": (3, 4)},
            "tokens without queries": {"silent_queries": True},
            "tokens without queries, large": {"silent_queries": True, "kind": "large"},
            "larger eps": {"eps": 1e-3},
        },
        {
            "L0 stage 4": {"heads": 32, "head_dim": 32, "size": (32, 32), "batch": 1},
            "XL0 stage 5": {"heads": 64, "head_dim": 32, "size": (16, 16), "batch": 1},
        },
    ),
    "multi_scale_attention": (
        {
            **_KINDS,
            "scale 3": {"scales": (3,)},
            "scales 3 and 5": {"scales": (3, 5)},
            "no further scale": {"scales": ()},
            "biases": {"bias": (True, True), "scale_bias": True, "scales": (3, 5)},
            "outer biases only": {"bias": (True, True)},
            "bias of the projection only": {"bias": (False, True)},
            "no residual": {"residual": False},
            "head dim 8": {"head_dim": 8, "heads": 3},
            "head dim 32": {"head_dim": 32},
            "head dim 64": {"head_dim": 64, "heads": 1},
            "fewer tokens than channels": {"head_dim": 32, "size": (5, 6)},
            "as many tokens as channels": {"size": (4, 4)},
            "one pixel": {"size": (1, 1)},
            "other width out": {"channels": (13, 21), "residual": False},
            "larger eps": {"eps": 1e-3},
        },
        {
            **{
                f"many channels, {kind}": {
                    "channels": (128, 128),
                    "heads": 4,
                    "head_dim": 32,
                    "size": (12, 12),
                    "kind": kind,
                }
                for kind in INPUT_KINDS
            },
            "L0 stage 4": {
                "channels": (512, 512),
                "heads": 16,
                "head_dim": 32,
                "scales": (5,),
                "size": (12, 12),
            },
            "XL0 stage 4": {
                "channels": (512, 512),
                "heads": 16,
                "head_dim": 32,
                "scales": (3,),
                "size": (12, 12),
            },
            "XL0 stage 5": {
                "channels": (1024, 1024),
                "heads": 32,
                "head_dim": 32,
                "scales": (3,),
                "size": (8, 8),
                "batch": 1,
            },
        },
    ),
    "layer_norm_2d": (
        {
            **_KINDS,
            "mean far above deviation": {"channels": 64, "size": (16, 16), "offset": 1.0},
            "mean far below deviation": {"channels": 64, "size": (16, 16), "offset": -1.0},
            "constant, many channels": {"channels": 256, "size": (16, 16), "kind": "constant"},
            "large, many channels": {"channels": 256, "kind": "large"},
            "no weight": {"weight": False},
            "no bias": {"bias": False},
            "no weight, no bias": {"weight": False, "bias": False},
            "float32 weight and bias": {"float32_affine": True},
            "no eps": {"eps": 0.0},
            "larger eps": {"eps": 0.1},
            "two channels": {"channels": 2},
            "odd channels": {"channels": 13, "size": (3, 5)},
            "17 channels": {"channels": 17},
            "one pixel": {"size": (1, 1), "channels": 40},
        },
        {
            "encoder output": {"channels": 256, "size": (64, 64), "batch": 1},
            "mask decoder": {"channels": 64, "size": (64, 64)},
            "mask prompt": {"channels": 4, "size": (64, 64)},
            # Here, as its gradient with respect to x and weight is zero.
            "one channel": {"channels": 1},
        },
    ),
    "upsample_add": (
        {
            **_KINDS,
            "overshoot taken back": {"opposite": True, "inputs": ((6, 6),), "size": (15, 14)},
            "one map": {"inputs": ((5, 7),), "size": (13, 17)},
            "one map of the same size": {"inputs": ((6, 5),), "size": (6, 5)},
            "smaller": {"inputs": ((13, 17), (7, 9)), "size": (5, 4)},
            "odd factors": {"inputs": ((3, 5), (7, 4)), "size": (17, 11)},
            "from one pixel": {"inputs": ((1, 1), (2, 3)), "size": (5, 4)},
            "to one pixel": {"inputs": ((4, 5), (1, 1)), "size": (1, 1)},
            "from one row": {"inputs": ((1, 9),), "size": (4, 12)},
            "five maps": {"inputs": ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6)), "size": (8, 8)},
            "odd channels": {"channels": 13},
        },
        {
            "L0 neck": {
                "channels": 256,
                "inputs": ((16, 16), (32, 32), (64, 64)),
                "size": (64, 64),
                "batch": 1,
            },
        },
    ),
}


CASES: dict[str, tuple[Case, ...]] = {
    op: (
        *(Case(op, name, settings) for name, settings in quick.items()),
        *(Case(op, name, settings, quick=False) for name, settings in others.items()),
    )
    for op, (quick, others) in _SETTINGS.items()
}
"""The cases of every operation, quick ones first."""
