"""Stand-ins for others' modules: the structure of the authors' package, no class of ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

ACTS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    None: lambda: None,
}


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)


NORMS = {"bn2d": nn.BatchNorm2d, "ln2d": LayerNorm2d, None: lambda channels: None}


class ConvLayer(nn.Module):
    def __init__(
        self, cin, cout, k=3, stride=1, dilation=1, groups=1, bias=False, norm="bn2d", act="relu"
    ):
        super().__init__()
        padding = k // 2 * dilation
        self.dropout = None
        self.conv = nn.Conv2d(cin, cout, k, stride, padding, dilation, groups, bias)
        self.norm = NORMS[norm](cout)
        self.act = ACTS[act]()

    def forward(self, x):
        x = self.conv(x)
        if self.norm:
            x = self.norm(x)
        return self.act(x) if self.act else x


class DSConv(nn.Module):
    def __init__(self, cin, cout, k, stride, bias, norm, act):
        super().__init__()
        self.depth_conv = ConvLayer(cin, cin, k, stride, 1, cin, bias[0], norm[0], act[0])
        self.point_conv = ConvLayer(cin, cout, 1, 1, 1, 1, bias[1], norm[1], act[1])

    def forward(self, x):
        return self.point_conv(self.depth_conv(x))


class MBConv(nn.Module):
    def __init__(self, cin, cout, k, stride, mid, bias, norm, act):
        super().__init__()
        self.inverted_conv = ConvLayer(cin, mid, 1, 1, 1, 1, bias[0], norm[0], act[0])
        self.depth_conv = ConvLayer(mid, mid, k, stride, 1, mid, bias[1], norm[1], act[1])
        self.point_conv = ConvLayer(mid, cout, 1, 1, 1, 1, bias[2], norm[2], act[2])

    def forward(self, x):
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class FusedMBConv(nn.Module):
    def __init__(self, cin, cout, k, stride, mid, bias, norm, act, groups=1):
        super().__init__()
        self.spatial_conv = ConvLayer(cin, mid, k, stride, 1, groups, bias[0], norm[0], act[0])
        self.point_conv = ConvLayer(mid, cout, 1, 1, 1, 1, bias[1], norm[1], act[1])

    def forward(self, x):
        return self.point_conv(self.spatial_conv(x))


class ResBlock(nn.Module):
    def __init__(self, cin, cout, k, stride, mid, bias, norm, act):
        super().__init__()
        self.conv1 = ConvLayer(cin, mid, k, stride, 1, 1, bias[0], norm[0], act[0])
        self.conv2 = ConvLayer(mid, cout, k, 1, 1, 1, bias[1], norm[1], act[1])

    def forward(self, x):
        return self.conv2(self.conv1(x))


class LiteMLA(nn.Module):
    def __init__(self, cin, cout, heads, dim, scales=(5,), bias=False, kernel="relu", act=None):
        super().__init__()
        width = 3 * heads * dim
        self.dim, self.eps = dim, 1e-15
        self.qkv = ConvLayer(cin, width, 1, bias=bias, norm=None, act=None)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, scale, 1, scale // 2, groups=width, bias=bias),
                nn.Conv2d(width, width, 1, groups=3 * heads, bias=bias),
            )
            for scale in scales
        )
        self.kernel_func = ACTS[kernel]()
        self.proj = ConvLayer(heads * dim * (1 + len(scales)), cout, 1, norm="bn2d", act=act)

    def forward(self, x):
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], dim=1)
        b, _, h, w = qkv.shape
        q, k, v = qkv.reshape(b, -1, 3 * self.dim, h * w).split(self.dim, dim=2)
        q, k = self.kernel_func(q), self.kernel_func(k)
        scores = k.transpose(-1, -2) @ q
        out = v @ (scores / (scores.sum(2, keepdim=True) + self.eps))
        return self.proj(out.reshape(b, -1, h, w))


class IdentityLayer(nn.Module):
    def forward(self, x):
        return x


class ResidualBlock(nn.Module):
    def __init__(self, main, shortcut=None, post_act=None, pre_norm=None):
        super().__init__()
        self.pre_norm, self.main, self.shortcut = pre_norm, main, shortcut
        self.post_act = ACTS[post_act]()

    def forward(self, x):
        y = self.main(self.pre_norm(x) if self.pre_norm else x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
            if self.post_act:
                y = self.post_act(y)
        return y


class UpSampleLayer(nn.Module):
    def __init__(self, mode="bicubic", size=(8, 8)):
        super().__init__()
        self.mode, self.size, self.align_corners = mode, list(size), False

    def forward(self, x):
        return F.interpolate(x, self.size, mode=self.mode, align_corners=False)


class OpSequential(nn.Module):
    def __init__(self, op_list):
        super().__init__()
        self.op_list = nn.ModuleList(op_list)

    def forward(self, x):
        for op in self.op_list:
            x = op(x)
        return x


class SamNeck(nn.Module):
    def __init__(self, widths, width, merge="add", modes=("bicubic", "bicubic")):
        super().__init__()
        self.input_keys = [f"stage{index}" for index in range(len(widths))]
        self.input_ops = nn.ModuleList(
            OpSequential([ConvLayer(cin, width, 1, act=None), UpSampleLayer(mode)])
            for cin, mode in zip(widths, modes, strict=True)
        )
        self.merge, self.post_input = merge, None
        block = FusedMBConv(
            width, width, 3, 1, 2 * width, (False,) * 2, ("bn2d",) * 2, ("gelu", None)
        )
        self.middle = OpSequential([ResidualBlock(block, IdentityLayer()), Unknown(width)])
        self.output_keys = ["sam_encoder"]
        self.output_ops = nn.ModuleList([ConvLayer(width, 5, 1, bias=True, norm=None, act=None)])

    def forward(self, features):
        feat = sum(
            op(features[key]) for key, op in zip(self.input_keys, self.input_ops, strict=True)
        )
        feat = self.middle(feat)
        for key, op in zip(self.output_keys, self.output_ops, strict=True):
            features[key] = op(feat)
        return features


class Unknown(nn.Module):
    """A module fuse() has never heard of."""

    def __init__(self, channels):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 1.5))

    def forward(self, x):
        return self.mix(x) * self.scale
