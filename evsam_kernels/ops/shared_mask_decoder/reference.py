"""The formulas of the stages, in plain torch.

The keys of the image, N positions, are `scales * base + vectors^T rows`, position by position: the
base is shared by all prompts, and each prompt has scales, vectors and rows of its own. Positions
lie in tiles of P; the formulas take a single tile of all of them.

B is the number of prompts, T that of tokens, R that of the vectors; h heads of d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basis(NamedTuple):
    """What a prompt has of its own at every position: vectors `[B, tiles, R, P]`, scales
    `[B, tiles, P]`."""

    vectors: Tensor
    scales: Tensor


class SharedMap(NamedTuple):
    """A linear map of the keys for all prompts, `scales * base + offsets`: `[tiles, h d, P]` each.

    The offsets are None for the keys before the first block, which have no scales.
    """

    base: Tensor
    offsets: Tensor | None


class Values(NamedTuple):
    """What the tokens give to the keys in a block of the decoder.

    `differences` `[B, h, d, T - 1]` are the tokens' values less the last token's; `last`
    `[B, h d + 1]` are that one's, and 1. A table `[h d + 1, M]` maps the former to a row for each
    of these tokens and each head, by the head's rows of the table, and `last` to one more row.
    """

    differences: Tensor
    last: Tensor


class Norm(NamedTuple):
    """The keys before a LayerNorm: base `[tiles, C, P]`, its squared norm `[tiles, P]`, eps."""

    base: Tensor
    square: Tensor
    eps: float


class Upscaling(NamedTuple):
    """Weights of the upscaling.

    `offsets` `[4 M]` are those of the first convolution, less their mean over the M channels of
    each of its 4 pixels; `norm_weight`, `norm_bias` `[M]`, `eps`; `weight` `[M, 4, K]` and `bias`
    `[K]` are the second convolution's. `dtype` is that of the weights as they are stored: kernels
    may round to it what the convolutions multiply.
    """

    offsets: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    weight: Tensor
    bias: Tensor
    dtype: torch.dtype


class Linear(NamedTuple):
    """A linear layer: `[out, in]`, and `[out]` or None."""

    weight: Tensor
    bias: Tensor | None


class Memory:
    """Room for the results of an image's prompts."""

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        """A tensor of the dtype and on the device of `like`."""
        return like.new_empty(shape)


def tiled(x: Tensor) -> Tensor:
    """`[..., N]` -> `[1, ..., N]`."""
    return x[None]


def feed_forward(
    layers: Sequence[Linear],
    x: Tensor,  # [..., in of the first layer]
    residual: Tensor | None = None,  # [..., out of the last layer]
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    """Linear layers with ReLU between them, then a residual and LayerNorm where they are given."""
    for layer in layers[:-1]:
        x = F.relu(F.linear(x, *layer))
    x = F.linear(x, *layers[-1])
    if residual is not None:
        x = residual + x
    return x if norm is None else norm(x)


def attend_tokens(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention of a prompt's tokens to one another, `[B, T, C]` each, in so many heads."""
    of_heads = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(*of_heads).transpose(1, 2).flatten(2)


def map_values(values: Sequence[Values], tables: Sequence[Tensor], groups: int) -> Tensor:
    """What tables make of the values of every block, side by side.

    Returns:
        `[B, groups, R, M / groups]`, the columns of a group together.
    """
    rows = []
    for (differences, last), table in zip(values, tables, strict=True):
        batch, heads, _, others = differences.shape
        # One product per head, for all prompts.
        of_heads = differences.permute(1, 0, 3, 2).flatten(1, 2)
        grouped = of_heads @ table[:-1].unflatten(0, (heads, -1))
        rows.append(grouped.unflatten(1, (batch, others)).transpose(0, 1).flatten(1, 2))
        rows.append((last @ table)[:, None])
    return torch.cat(rows, dim=1).unflatten(2, (groups, -1)).transpose(1, 2)


def attend_keys(
    queries: Tensor,  # [B, h, d, T], times what the softmax scales by
    keys: SharedMap,
    values: Tensor,  # [N, h d]
    basis: Basis | None,
    row_queries: Tensor | None,  # [B, h, R, T], the queries times the keys of the vectors' rows
    positions: int,
) -> tuple[Tensor, Tensor]:
    """Attention of tokens to the keys.

    Returns:
        `[B, h, T, d]`, the sum of `values` weighted by the softmax over positions and the scales,
        and `[B, h, T, R]`, that of the vectors weighted by the softmax.
    """
    batch, heads, _, tokens = queries.shape
    mapped = _mapped(keys, basis).unflatten(1, (heads, -1))  # [B or 1, h, d, N]
    scores = queries.mT @ mapped
    if basis is None or row_queries is None:
        weights = scores.softmax(-1)
        of_basis = weights.new_empty(batch, heads, tokens, 0)
        scaled = weights
    else:
        vectors = basis.vectors[:, 0, None]
        weights = (scores + row_queries.mT @ vectors).softmax(-1)
        of_basis = weights @ vectors.mT
        scaled = weights * basis.scales[:, 0, None, None]
    return scaled @ values.unflatten(1, (heads, -1)).transpose(0, 1), of_basis


def update_keys(
    tokens: Tensor,  # [B, h, d, T - 1], keys of the tokens less the last one's
    queries: SharedMap,
    basis: Basis | None,
    row_tokens: Tensor | None,  # [B, h, R, T - 1], the queries of the vectors' rows times `tokens`
    values: Sequence[Values],  # of every block so far
    features: Sequence[Tensor],  # [tiles, h d + 1, P], the base's products with what these become
    norm: Norm,
    rows: Tensor,  # [B, R', C], of the vectors
    memory: Memory,  # for the basis
) -> Basis:
    """The image attends to tokens, and LayerNorm without its weights: the basis after a block.

    With w the softmax over tokens, its last weight left out, the new vectors are those there were,
    w and 1, R' in all. They and the scales are divided by the standard deviation of what they
    describe, which kernels compute from `values` and `features`, and this formula from its
    definition.
    """
    scores = tokens.mT @ _mapped(queries, basis).unflatten(1, (tokens.shape[1], -1))
    if basis is not None and row_tokens is not None:
        scores = scores + row_tokens.mT @ basis.vectors[:, 0, None]
    weights = F.pad(scores, (0, 0, 0, 1)).softmax(2)[:, :, :-1].flatten(1, 2)
    parts = [weights, torch.ones_like(weights[:, :1])]
    if basis is not None:
        parts.insert(0, basis.vectors[:, 0])
    vectors = torch.cat(parts, dim=1)  # [B, R', N]
    scales = (
        vectors.new_ones(len(vectors), vectors.shape[2]) if basis is None else basis.scales[:, 0]
    )
    keys = scales[:, None] * norm.base + rows.mT @ vectors
    by = (keys.square().mean(1) + norm.eps).rsqrt()
    return Basis((vectors * by[:, None])[:, None], (scales * by)[:, None])


def upscale_masks(
    base: Tensor,  # [tiles, 4 M, P], the first convolution of the base, centred as its offsets
    basis: Basis,
    rows: Tensor,  # [B, R, 4 M], that of the vectors' rows
    upscaling: Upscaling,
    vectors: Tensor,  # [masks, K]
    counts: Tensor,  # int64 [B], masks of each prompt
    masks: Tensor,  # [masks, 4 height, 4 width], written to
) -> None:
    """Both convolutions, then the product with each mask's vector."""
    middle, _, channels = upscaling.weight.shape
    height, width = (side // 4 for side in masks.shape[1:])
    x = basis.scales * base + rows.mT @ basis.vectors[:, 0] + upscaling.offsets[:, None]
    x = x.unflatten(1, (4, middle))
    x = x * (x.square().mean(2, keepdim=True) + upscaling.eps).rsqrt()
    x = F.gelu(x * upscaling.norm_weight[:, None] + upscaling.norm_bias[:, None])
    z = (upscaling.weight.flatten(1).mT @ x).unflatten(2, (4, channels))
    z = F.gelu(z + upscaling.bias[:, None])  # [B, 4, 4, K, N]
    wanted = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    grouped = vectors.new_zeros(*wanted.shape, channels)
    grouped[wanted] = vectors
    found = (grouped[:, None, None] @ z).unflatten(-1, (height, width))  # [B, 4, 4, most, h, w]
    found = found.unflatten(2, (2, 2)).unflatten(1, (2, 2)).permute(0, 5, 6, 1, 3, 7, 2, 4)
    masks.copy_(found.reshape(*wanted.shape, *masks.shape[1:])[wanted])


def _mapped(shared: SharedMap, basis: Basis | None) -> Tensor:
    """What the base contributes to a linear map of the keys: `[B or 1, h d, N]`."""
    mapped = shared.base if basis is None else basis.scales * shared.base
    return mapped if shared.offsets is None else mapped + shared.offsets
