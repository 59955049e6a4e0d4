"""The stages as Triton kernels; shapes are those of `reference.py`, in one tile of all positions.

Heads are no axis of the kernels: queries are the rows of a matrix, each zero outside the channels
of its head, so that one product serves all heads and what they share is read once.

- `attend_kernel` goes over a part of the positions as flash attention does; what the parts give is
  added up afterwards, in order.
- `update_kernel` computes the deviation that LayerNorm divides by from its definition: the keys,
  tile by tile, which are not stored.
- `upscale_kernel` has both transposed convolutions, LayerNorm, GELU and the product with the masks'
  vectors in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from evsam_kernels.ops.gpu import limits
from evsam_kernels.ops.shared_mask_decoder.reference import (
    Basis,
    Memory,
    Norm,
    SharedMap,
    Upscaling,
    Values,
    attend_tokens,
    feed_forward,
    map_values,
    tiled,
)
from evsam_kernels.simt import emulation

__all__ = [
    "DTYPES",
    "Memory",
    "attend_keys",
    "attend_tokens",
    "feed_forward",
    "map_values",
    "tiled",
    "update_keys",
    "upscale_masks",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_ROWS = 32
_TERMS = 32


@triton.jit
def _scores(
    queries,  # to [rows, inner], of the shared map
    row_queries,  # to [rows, count], of the program's rows
    keys,  # to [inner, N]
    offsets,  # the same, or None
    vectors,  # to [count, N]
    scale,  # [BN]
    row,
    in_row,
    position,
    in_map,
    positions,
    inner,
    count,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Products of queries with the keys at some positions: `[BT, BN]`."""
    scores = tl.zeros((BT, BN), tl.float32)
    for start in range(0, inner, BK):
        channel = start + tl.arange(0, BK)
        query = tl.load(
            queries + row[:, None] * inner + channel[None, :],
            mask=in_row[:, None] & (channel < inner)[None, :],
            other=0.0,
        )
        at = channel.to(tl.int64)[:, None] * positions + position[None, :]
        inside = (channel < inner)[:, None] & in_map[None, :]
        shared = tl.load(keys + at, mask=inside, other=0.0)
        if offsets is not None:
            shared = shared * scale[None, :]
            shared += tl.load(offsets + at, mask=inside, other=0.0)
        scores = tl.dot(query, shared, scores, input_precision=PRECISION)
    if vectors is not None:
        for start in range(0, count, BK):
            vector = start + tl.arange(0, BK)
            query = tl.load(
                row_queries + row[:, None] * count + vector[None, :],
                mask=in_row[:, None] & (vector < count)[None, :],
                other=0.0,
            )
            some = tl.load(
                vectors + vector.to(tl.int64)[:, None] * positions + position[None, :],
                mask=(vector < count)[:, None] & in_map[None, :],
                other=0.0,
            )
            scores = tl.dot(query, some, scores, input_precision=PRECISION)
    return scores


@triton.jit
def _scale_at(scales, position, in_map):
    """Scales of the base at some positions, 1 where there are none."""
    scale = tl.full(position.shape, 1.0, tl.float32)
    if scales is not None:
        scale = tl.load(scales + position, mask=in_map, other=0.0)
    return scale


@triton.jit(do_not_specialize=["positions", "part"])
def attend_kernel(
    queries,  # [B, rows, inner]
    keys,  # [inner, N]
    offsets,  # [inner, N], or None
    values,  # [N, inner]
    vectors,  # [B, count, N], or None
    scales,  # [B, N], or None
    row_queries,  # [B, rows, count], or None
    largest,  # [parts, B, rows], of the scores
    weight,  # [parts, B, rows], sum of exp(score - largest)
    shared,  # [parts, B, rows, inner], sum of that times values and scales
    of_basis,  # [parts, B, rows, count], times vectors; or None
    batch,
    positions,  # N
    part,  # positions of a part
    rows,
    inner,
    count,
    columns,  # 1 + ceil(count / D)
    D: tl.constexpr,  # at least inner
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    # A program for each part and BT rows of a prompt: one for the values, others for D vectors.
    which = tl.program_id(2)
    prompt = which // columns
    chosen = which % columns
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    in_row = row < rows
    own = prompt.to(tl.int64) * rows + row
    queries += prompt.to(tl.int64) * rows * inner
    if vectors is not None:
        vectors += prompt.to(tl.int64) * count * positions
        scales += prompt.to(tl.int64) * positions
        row_queries += prompt.to(tl.int64) * rows * count
    channel = tl.arange(0, D)
    vector = (chosen - 1) * D + tl.arange(0, D)
    in_values = (channel < inner) & (chosen == 0)
    in_vectors = (vector >= 0) & (vector < count)

    peak = tl.full((BT,), -float("inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    sums = tl.zeros((BT, D), tl.float32)
    first = tl.program_id(0) * part
    last = tl.minimum(first + part, positions)
    for start in range(first, last, BN):
        position = start + tl.arange(0, BN)
        in_map = position < last
        scale = _scale_at(scales, position, in_map)
        scores = _scores(
            queries, row_queries, keys, offsets, vectors, scale,
            row, in_row, position, in_map, positions, inner, count, PRECISION, BT, BK, BN,
        )  # fmt: skip
        scores = tl.where(in_map[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shrink = tl.exp(peak - higher)
        weights = tl.exp(scores - higher[:, None])
        peak = higher
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = tl.load(
            values + position.to(tl.int64)[:, None] * inner + channel[None, :],
            mask=in_map[:, None] & in_values[None, :],
            other=0.0,
        )
        weighted *= scale[:, None]
        if vectors is not None:
            weighted += tl.load(
                vectors + vector.to(tl.int64)[None, :] * positions + position[:, None],
                mask=in_map[:, None] & in_vectors[None, :],
                other=0.0,
            )
        sums = tl.dot(weights, weighted, sums * shrink[:, None], input_precision=PRECISION)
    at = tl.program_id(0).to(tl.int64) * batch * rows + own
    tl.store(largest + at, peak, mask=in_row & (chosen == 0))
    tl.store(weight + at, total, mask=in_row & (chosen == 0))
    tl.store(
        shared + at[:, None] * inner + channel[None, :],
        sums,
        mask=in_row[:, None] & in_values[None, :],
    )
    if vectors is not None:
        tl.store(
            of_basis + at[:, None] * count + vector[None, :],
            sums,
            mask=in_row[:, None] & in_vectors[None, :],
        )


@triton.jit(do_not_specialize=["positions"])
def update_kernel(
    tokens,  # [B, H * TP, inner]
    queries,  # [inner, N]
    offsets,  # [inner, N], or None
    vectors,  # [B, count, N], or None
    scales,  # [B, N], or None
    row_tokens,  # [B, H * TP, count], or None
    base,  # [channels, N]
    old_rows,  # [B, count, channels], or None
    new_rows,  # [B, H * TP, channels]
    one_row,  # [B, channels]
    new_vectors,  # [B, count + heads * others + 1, N]
    new_scales,  # [B, N]
    positions,  # N
    inner,
    count,
    channels,
    heads,
    others,  # tokens but the last one
    eps,
    H: tl.constexpr,  # at least heads
    TP: tl.constexpr,  # at least others
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    prompt = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BN + tl.arange(0, BN)
    in_map = position < positions
    row = tl.arange(0, H * TP)
    tokens += prompt * (H * TP) * inner
    if vectors is not None:
        vectors += prompt * count * positions
        scales += prompt * positions
        row_tokens += prompt * (H * TP) * count
        old_rows += prompt * count * channels
    scale = _scale_at(scales, position, in_map)
    scores = _scores(
        tokens, row_tokens, queries, offsets, vectors, scale,
        row, row >= 0, position, in_map, positions, inner, count, PRECISION, H * TP, BK, BN,
    )  # fmt: skip

    # Softmax over a head's tokens, the last of which has score 0.
    is_token = (tl.arange(0, TP) < others)[None, :, None]
    of_heads = tl.where(is_token, tl.reshape(scores, (H, TP, BN)), -float("inf"))
    peak = tl.maximum(tl.max(of_heads, axis=1), 0.0)
    raised = tl.exp(of_heads - peak[:, None, :])
    divisor = tl.sum(raised, axis=1) + tl.exp(-peak)
    weights = tl.reshape(raised / divisor[:, None, :], (H * TP, BN))

    square = tl.zeros((BN,), tl.float32)
    for start in range(0, channels, BC):
        some = start + tl.arange(0, BC)
        in_key = some < channels
        key = tl.load(
            base + some.to(tl.int64)[:, None] * positions + position[None, :],
            mask=in_key[:, None] & in_map[None, :],
            other=0.0,
        )
        key = key * scale[None, :]
        key += tl.load(one_row + prompt * channels + some, mask=in_key, other=0.0)[:, None]
        factor = tl.load(
            new_rows + (prompt * (H * TP) + row)[None, :] * channels + some[:, None],
            mask=in_key[:, None],
            other=0.0,
        )
        key = tl.dot(factor, weights, key, input_precision=PRECISION)
        if vectors is not None:
            for before in range(0, count, BK):
                vector = before + tl.arange(0, BK)
                of_old = tl.load(
                    old_rows + vector[None, :] * channels + some[:, None],
                    mask=in_key[:, None] & (vector < count)[None, :],
                    other=0.0,
                )
                old = tl.load(
                    vectors + vector.to(tl.int64)[:, None] * positions + position[None, :],
                    mask=(vector < count)[:, None] & in_map[None, :],
                    other=0.0,
                )
                key = tl.dot(of_old, old, key, input_precision=PRECISION)
        square += tl.sum(key * key, axis=0)
    by = 1.0 / tl.sqrt_rn(square / channels + eps)

    tl.store(new_scales + prompt * positions + position, scale * by, mask=in_map)
    new_vectors += prompt * (count + heads * others + 1) * positions
    if vectors is not None:
        for start in range(0, count, BK):
            vector = start + tl.arange(0, BK)
            at = vector.to(tl.int64)[:, None] * positions + position[None, :]
            inside = (vector < count)[:, None] & in_map[None, :]
            old = tl.load(vectors + at, mask=inside, other=0.0)
            tl.store(new_vectors + at, old * by[None, :], mask=inside)
    new_vectors += count.to(tl.int64) * positions
    head = row // TP
    token = row % TP
    at = (head * others + token).to(tl.int64)[:, None] * positions + position[None, :]
    inside = ((head < heads) & (token < others))[:, None] & in_map[None, :]
    tl.store(new_vectors + at, weights * by[None, :], mask=inside)
    new_vectors += (heads * others).to(tl.int64) * positions
    tl.store(new_vectors + position, by, mask=in_map)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["positions", "width"])
def upscale_kernel(
    base,  # [4 * middle, N]
    vectors,  # [B, count, N]
    scales,  # [B, N]
    rows,  # [B, count, 4 * middle]
    offsets,  # [4 * middle]
    norm_weight,  # [middle]
    norm_bias,  # [middle]
    weight,  # [middle, 4 * K]
    bias,  # [K]
    of_masks,  # [masks, K]
    first_mask,  # [B + 1]
    masks,  # [masks, 4 * height, 4 * width]
    positions,  # N
    width,
    count,
    middle,
    eps,
    M: tl.constexpr,  # at least middle
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    # A program computes two lines of each position's four, of all its prompt's masks.
    prompt = tl.program_id(1).to(tl.int64)
    half = tl.program_id(2)
    first = tl.load(first_mask + prompt)
    end = tl.load(first_mask + prompt + 1)
    position = tl.program_id(0) * BN + tl.arange(0, BN)
    in_map = position < positions
    in_both = tl.arange(0, M)
    in_middle = in_both < middle
    pixel = tl.arange(0, 4 * K)
    scale = tl.load(scales + prompt * positions + position, mask=in_map, other=0.0)
    factors = tl.load(
        weight + in_both[None, :] * (4 * K) + pixel[:, None], mask=in_middle[None, :], other=0.0
    )
    channel_bias = tl.load(bias + pixel % K)
    gain = tl.load(norm_weight + in_both, mask=in_middle, other=0.0)
    shift = tl.load(norm_bias + in_both, mask=in_middle, other=0.0)
    vectors += prompt * count * positions
    rows += prompt * count * (4 * middle)

    left = tl.zeros((4, K, BN), tl.float32)
    right = tl.zeros((4, K, BN), tl.float32)
    for side in tl.static_range(2):
        channel = (2 * half + side) * middle + in_both
        x = tl.load(
            base + channel.to(tl.int64)[:, None] * positions + position[None, :],
            mask=in_middle[:, None] & in_map[None, :],
            other=0.0,
        )
        x = x * scale[None, :]
        x += tl.load(offsets + channel, mask=in_middle, other=0.0)[:, None]
        for start in range(0, count, BK):
            vector = start + tl.arange(0, BK)
            of_rows = tl.load(
                rows + vector[None, :] * (4 * middle) + channel[:, None],
                mask=in_middle[:, None] & (vector < count)[None, :],
                other=0.0,
            )
            some = tl.load(
                vectors + vector.to(tl.int64)[:, None] * positions + position[None, :],
                mask=(vector < count)[:, None] & in_map[None, :],
                other=0.0,
            )
            x = tl.dot(of_rows, some, x, input_precision=PRECISION)
        deviation = tl.sqrt_rn(tl.sum(x * x, axis=0) / middle + eps)
        x = _gelu(x / deviation[None, :] * gain[:, None] + shift[:, None])
        z = tl.dot(factors, x, input_precision=PRECISION)
        z = tl.reshape(_gelu(z + channel_bias[:, None]), (4, K, BN))
        if side == 0:
            left = z
        else:
            right = z

    # Lines 2 * half and 2 * half + 1 of the four of each position, from four columns each.
    line = position // width * 4 + 2 * half
    column = (position % width) * 4
    lower = tl.arange(0, 2)
    along = tl.arange(0, 4)
    at = (line[None, :] + lower[:, None]).to(tl.int64) * (4 * width) + column[None, :]
    at = at[:, :, None] + along[None, None, :]
    size = 16 * positions.to(tl.int64)
    for mask in range(first, end):
        of_mask = tl.load(of_masks + mask * K + tl.arange(0, K))[None, :, None]
        in_left = tl.sum(left * of_mask, axis=1)  # [4, BN], lines and columns of two
        in_right = tl.sum(right * of_mask, axis=1)
        # [lower line, right, right half, BN] -> [lower line, BN, right half, right]
        both = tl.permute(tl.reshape(tl.join(in_left, in_right), (2, 2, BN, 2)), (0, 2, 3, 1))
        tl.store(masks + mask * size + at, tl.reshape(both, (2, BN, 4)), mask=in_map[None, :, None])


def attend_keys(
    queries: Tensor,
    keys: SharedMap,
    values: Tensor,
    basis: Basis | None,
    row_queries: Tensor | None,
    positions: int,
) -> tuple[Tensor, Tensor]:
    """See `reference.attend_keys`."""
    batch, heads, dim, tokens = queries.shape
    rows, inner = heads * tokens, heads * dim
    count = 0 if row_queries is None else row_queries.shape[2]
    own = _by_head(queries.mT, heads, tokens)
    block = 32
    width = triton.next_power_of_2(inner)
    columns, row_blocks = 1 + -(-count // width), -(-rows // _ROWS)
    # Two programs for each multiprocessor.
    parts = -(-2 * limits(queries).multiprocessors // (batch * columns * row_blocks))
    part = -(-positions // min(parts, -(-positions // block)) // block) * block
    part = max(part, block)
    parts = -(-positions // part)

    def made(*shape: int) -> Tensor:
        return emulation.unwritten(queries.new_empty(parts, batch, rows, *shape))

    largest, weight, shared, of_basis = made(), made(), made(inner), made(count)
    attend_kernel[(parts, row_blocks, batch * columns)](
        own,
        keys.base.contiguous(),
        _contiguous(keys.offsets),
        values.contiguous(),
        None if basis is None else basis.vectors.contiguous(),
        None if basis is None else basis.scales.contiguous(),
        None if row_queries is None else row_queries.mT.reshape(batch, rows, count).contiguous(),
        largest,
        weight,
        shared,
        of_basis if count else None,
        batch,
        positions,
        part,
        rows,
        inner,
        count,
        columns,
        D=width,
        PRECISION=_precision(),
        BT=_ROWS,
        BK=_TERMS,
        BN=block,
        num_warps=8,
        num_stages=1,
    )
    share = torch.exp(largest - largest.amax(0))
    share = share / (share * weight).sum(0)
    of_heads = (share[..., None] * shared).sum(0).view(batch, heads, tokens, heads, dim)
    diagonal = of_heads.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    of_vectors = (share[..., None] * of_basis).sum(0).view(batch, heads, tokens, count)
    return diagonal, of_vectors


def update_keys(
    tokens: Tensor,
    queries: SharedMap,
    basis: Basis | None,
    row_tokens: Tensor | None,
    values: Sequence[Values],
    features: Sequence[Tensor],
    norm: Norm,
    rows: Tensor,
    memory: Memory,
) -> Basis:
    """See `reference.update_keys`."""
    batch, heads, dim, others = tokens.shape
    count = 0 if row_tokens is None else row_tokens.shape[2]
    channels, positions = norm.base.shape[1:]
    padded_heads = triton.next_power_of_2(heads)
    padded = max(triton.next_power_of_2(others), -(-16 // padded_heads))

    def spread(x: Tensor) -> Tensor:  # [B, h, T - 1, ...] -> [B, H * TP, ...]
        return F.pad(x, (0, 0, 0, padded - others, 0, padded_heads - heads)).flatten(1, 2)

    of_block = rows[:, count:-1].unflatten(1, (heads, others))
    vectors = emulation.unwritten(memory.empty(batch, 1, rows.shape[1], positions, like=rows))
    scales = emulation.unwritten(memory.empty(batch, 1, positions, like=rows))
    block = 32
    update_kernel[(-(-positions // block), batch)](
        spread(_by_head(tokens.mT, heads, others).unflatten(1, (heads, others))),
        queries.base.contiguous(),
        _contiguous(queries.offsets),
        None if basis is None else basis.vectors.contiguous(),
        None if basis is None else basis.scales.contiguous(),
        None if row_tokens is None else spread(row_tokens.mT),
        norm.base.contiguous(),
        rows[:, :count].contiguous() if count else None,
        spread(of_block),
        rows[:, -1].contiguous(),
        vectors,
        scales,
        positions,
        heads * dim,
        count,
        channels,
        heads,
        others,
        norm.eps,
        H=padded_heads,
        TP=padded,
        PRECISION=_precision(),
        BC=64,
        BK=_TERMS,
        BN=block,
        num_warps=8,
        num_stages=1,
    )
    return Basis(vectors, scales)


def upscale_masks(
    base: Tensor,
    basis: Basis,
    rows: Tensor,
    upscaling: Upscaling,
    vectors: Tensor,
    counts: Tensor,
    masks: Tensor,
) -> None:
    """See `reference.upscale_masks`."""
    batch, count, _ = rows.shape
    middle, _, channels = upscaling.weight.shape
    height, width = (side // 4 for side in masks.shape[1:])
    if len(vectors) == 0:
        return
    emulation.unwritten(masks)
    missing = (0, triton.next_power_of_2(channels) - channels)
    block = 32
    upscale_kernel[(-(-height * width // block), batch, 2)](
        base.contiguous(),
        basis.vectors.contiguous(),
        basis.scales.contiguous(),
        rows.contiguous(),
        upscaling.offsets,
        upscaling.norm_weight,
        upscaling.norm_bias,
        F.pad(upscaling.weight, missing),
        F.pad(upscaling.bias, missing),
        F.pad(vectors, missing).contiguous(),
        F.pad(counts.cumsum(0), (1, 0)),
        masks,
        height * width,
        width,
        count,
        middle,
        upscaling.eps,
        M=max(16, triton.next_power_of_2(middle)),
        K=triton.next_power_of_2(channels),
        PRECISION=_precision(),
        BK=_TERMS,
        BN=block,
        num_warps=8,
        num_stages=1,
    )


def _by_head(x: Tensor, heads: int, rows: int) -> Tensor:
    """`[B, h, rows, d]` -> `[B, h rows, h d]`, zero outside the channels of a row's head."""
    of_own = torch.eye(heads, dtype=x.dtype, device=x.device)[:, None, :, None]
    return (x[:, :, :, None] * of_own).reshape(x.shape[0], heads * rows, -1)


def _precision() -> str:
    """How float32 matrices are multiplied, by PyTorch's setting."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
