"""Multi-scale linear attention and the EfficientViT block round it, trainable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evsam_kernels import ops
from evsam_kernels.nn.blocks import Activations, Biases, MBConv, Norms, ResidualBlock, per_conv
from evsam_kernels.nn.layers import ConvLayer, IdentityLayer, build_activation
from evsam_kernels.ops.layout import accumulation_dtype
from evsam_kernels.ops.relu_linear_attention.reference import kernel_attention


class LiteMLA(nn.Module):
    """Multi-scale linear attention: `[B, in_channels, H, W]` -> `[B, out_channels, H, W]`.

    Figure 2 of arXiv 2205.14756. Attributes `qkv`, `aggreg` (one depthwise and one grouped 1x1
    convolution per scale), `kernel_func`, `proj`. `heads` is `in_channels // dim * heads_ratio`
    unless given. The products are summed in float32 for half precision.

    Raises:
        ValueError: an even scale, or an unknown norm or activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        dim: int = 8,
        use_bias: Biases = False,
        norm: Norms = (None, "bn2d"),
        act_func: Activations = (None, None),
        kernel_func: str = "relu",
        scales: tuple[int, ...] = (5,),
        eps: float = 1e-15,
    ) -> None:
        super().__init__()
        if any(scale % 2 == 0 for scale in scales):
            raise ValueError(f"scales must be odd, got {scales}")
        heads = int(in_channels // dim * heads_ratio) if heads is None else heads
        biases, norms, acts = per_conv(use_bias, 2), per_conv(norm, 2), per_conv(act_func, 2)
        channels = 3 * heads * dim
        self.dim = dim
        self.eps = eps
        self.qkv = ConvLayer(
            in_channels, channels, 1, use_bias=biases[0], norm=norms[0], act_func=acts[0]
        )
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(
                    channels, channels, scale, padding=scale // 2, groups=channels, bias=biases[0]
                ),
                nn.Conv2d(channels, channels, 1, groups=3 * heads, bias=biases[0]),
            )
            for scale in scales
        )
        self.kernel_func = build_activation(kernel_func)
        self.proj = ConvLayer(
            heads * dim * (1 + len(scales)),
            out_channels,
            1,
            use_bias=biases[1],
            norm=norms[1],
            act_func=acts[1],
        )

    def _attend(self, qkv: Tensor) -> Tensor:
        """`[B, heads * 3 * dim, H, W]` -> `[B, heads * dim, H, W]`."""
        if isinstance(self.kernel_func, nn.ReLU):
            return ops.relu_linear_attention(qkv, head_dim=self.dim, eps=self.eps)
        kernel = nn.Identity() if self.kernel_func is None else self.kernel_func
        batch, channels, height, width = qkv.shape
        with torch.autocast(device_type=qkv.device.type, enabled=False):
            q, k, v = (
                qkv.to(accumulation_dtype(qkv.dtype))
                .reshape(batch, channels // (3 * self.dim), 3 * self.dim, height * width)
                .split(self.dim, dim=2)
            )
            out = kernel_attention(kernel(q), kernel(k), v, self.eps)
        return out.reshape(batch, channels // 3, height, width).to(qkv.dtype)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        scales = [qkv, *(aggregate(qkv) for aggregate in self.aggreg)]
        return self.proj(self._attend(torch.cat(scales, dim=1)))


class EfficientViTBlock(nn.Module):
    """LiteMLA then MBConv, each with a residual: `[B, C, H, W]` -> `[B, C, H, W]`.

    Raises:
        ValueError: `context_module` or `local_module` is not the one EfficientViT-SAM uses, or an
            unknown norm or activation.
    """

    def __init__(
        self,
        in_channels: int,
        heads_ratio: float = 1.0,
        dim: int = 32,
        expand_ratio: float = 4,
        scales: tuple[int, ...] = (5,),
        norm: str | None = "bn2d",
        act_func: str | None = "hswish",
        context_module: str = "LiteMLA",
        local_module: str = "MBConv",
    ) -> None:
        super().__init__()
        if context_module != "LiteMLA":
            raise ValueError(f"context_module must be 'LiteMLA', got {context_module!r}")
        if local_module != "MBConv":
            raise ValueError(f"local_module must be 'MBConv', got {local_module!r}")
        self.context_module = ResidualBlock(
            LiteMLA(
                in_channels,
                in_channels,
                heads_ratio=heads_ratio,
                dim=dim,
                norm=(None, norm),
                scales=scales,
            ),
            IdentityLayer(),
        )
        self.local_module = ResidualBlock(
            MBConv(
                in_channels,
                in_channels,
                expand_ratio=expand_ratio,
                use_bias=(True, True, False),
                norm=(None, None, norm),
                act_func=(act_func, act_func, None),
            ),
            IdentityLayer(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))
