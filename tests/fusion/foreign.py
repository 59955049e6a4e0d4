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


class SamAttention(nn.Module):
    def __init__(self, channels, heads, downsample_rate=1):
        super().__init__()
        self.embedding_dim, self.num_heads = channels, heads
        self.internal_dim = channels // downsample_rate
        self.q_proj = nn.Linear(channels, self.internal_dim)
        self.k_proj = nn.Linear(channels, self.internal_dim)
        self.v_proj = nn.Linear(channels, self.internal_dim)
        self.out_proj = nn.Linear(self.internal_dim, channels)

    def forward(self, q, k, v):
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class MLPBlock(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.lin2(self.act(self.lin1(x)))


class TwoWayAttentionBlock(nn.Module):
    def __init__(self, channels, heads, hidden, first):
        super().__init__()
        self.self_attn = SamAttention(channels, heads)
        self.cross_attn_token_to_image = SamAttention(channels, heads, 2)
        self.cross_attn_image_to_token = SamAttention(channels, heads, 2)
        self.mlp = MLPBlock(channels, hidden)
        for index in range(1, 5):
            setattr(self, f"norm{index}", nn.LayerNorm(channels, eps=1e-6))
        self.skip_first_layer_pe = first

    def forward(self, queries, keys, query_pe, key_pe):
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        q = self.norm1(queries)
        q = self.norm2(q + self.cross_attn_token_to_image(q + query_pe, keys + key_pe, keys))
        q = self.norm3(q + self.mlp(q))
        keys = keys + self.cross_attn_image_to_token(keys + key_pe, q + query_pe, q)
        return q, self.norm4(keys)


class TwoWayTransformer(nn.Module):
    def __init__(self, depth=2, channels=256, heads=8, hidden=96):
        super().__init__()
        self.depth, self.embedding_dim, self.num_heads, self.mlp_dim = (
            depth,
            channels,
            heads,
            hidden,
        )
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(channels, heads, hidden, index == 0) for index in range(depth)
        )
        self.final_attn_token_to_image = SamAttention(channels, heads, 2)
        self.norm_final_attn = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, image, image_pe, points):
        keys, key_pe, queries = image.flatten(2).mT, image_pe.flatten(2).mT, points
        for layer in self.layers:
            queries, keys = layer(queries, keys, points, key_pe)
        attended = self.final_attn_token_to_image(queries + points, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class SamMLP(nn.Module):
    def __init__(self, channels, hidden, out, depth, sigmoid_output=False):
        super().__init__()
        sizes = [channels, *[hidden] * (depth - 1), out]
        self.num_layers, self.sigmoid_output = depth, sigmoid_output
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        x = self.layers[-1](x)
        return x.sigmoid() if self.sigmoid_output else x


class MaskDecoder(nn.Module):
    """SAM's, as the `segment_anything` package has it."""

    def __init__(self, channels=256, transformer=None, masks=3, activation=nn.GELU):
        super().__init__()
        self.transformer_dim, self.num_multimask_outputs = channels, masks
        self.transformer = transformer or TwoWayTransformer(channels=channels)
        self.num_mask_tokens = masks + 1
        self.iou_token, self.mask_tokens = (
            nn.Embedding(1, channels),
            nn.Embedding(masks + 1, channels),
        )
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(channels, channels // 4, kernel_size=2, stride=2),
            SAM_LAYER_NORM_2D(channels // 4),
            activation(),
            nn.ConvTranspose2d(channels // 4, channels // 8, kernel_size=2, stride=2),
            activation(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            SamMLP(channels, channels, channels // 8, 3) for _ in range(masks + 1)
        )
        self.iou_prediction_head = SamMLP(channels, 48, masks + 1, 2)

    def forward(
        self,
        image_embeddings,
        image_pe,
        sparse_prompt_embeddings,
        dense_prompt_embeddings,
        multimask_output,
    ):
        batch = len(sparse_prompt_embeddings)
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(batch, -1, -1), sparse_prompt_embeddings], dim=1)
        source = image_embeddings.repeat_interleave(batch, dim=0) + dense_prompt_embeddings
        hs, keys = self.transformer(source, image_pe.repeat_interleave(batch, dim=0), tokens)
        upscaled = self.output_upscaling(keys.mT.reshape(source.shape))
        hyper = torch.stack(
            [mlp(hs[:, 1 + index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)], 1
        )
        masks = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        iou = self.iou_prediction_head(hs[:, 0])
        return (masks[:, 1:], iou[:, 1:]) if multimask_output else (masks[:, :1], iou[:, :1])


class SamLayerNorm2d(nn.Module):
    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.eps = eps

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


SAM_LAYER_NORM_2D = type("LayerNorm2d", (SamLayerNorm2d,), {})
"""Of the name that the package gives it; another class has that name here."""
