"""Triton kernels of `relu_linear_attention`, forward and backward.

Layout: NHWC, so that a token is a row and a head's q, k and v lie side by side in it. A program
has one head of one image; where these are too few to fill the GPU, several programs share one,
each with a range of tokens. Tile: BT tokens. The state (sum of k v^T and of k over tokens) stays
in float32 registers; programs that share a head leave their parts in global memory, and whoever
needs the sum adds them in order, so that the result is the same every time. Global memory: qkv
once and the result once, and the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.conv_act.triton import power_below
from evsam_kernels.ops.gpu import limits
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.simt.emulation import unwritten

DTYPES = HALF_AND_SINGLE

_TOKENS = 64

# Where a sum of products goes across lanes, a fused multiplication and addition leaves unrounded a
# lane's own product and not that of the other, so that lanes that share a sum would hold two.
_SAME_IN_ALL_LANES = {"enable_fp_fusion": False}


@triton.jit
def _rows(base, token, column, stride, tokens, dim):
    """Load `[BT, D]` in the type it has: columns `column` of rows `token`."""
    inside = (token < tokens)[:, None] & (column < dim)[None, :]
    return tl.load(base + token.to(tl.int64)[:, None] * stride + column[None, :], inside, other=0.0)


@triton.jit
def _store_rows(base, token, column, stride, tokens, dim, value):
    inside = (token < tokens)[:, None] & (column < dim)[None, :]
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, value.to(base.dtype.element_ty), inside)


@triton.jit
def _relu(x):
    return tl.where(x < 0, tl.zeros_like(x), x)  # Keeps the type, and a NaN.


@triton.jit
def _rescaling(qkv_largest, out_largest, eps):
    """What to multiply results by, and eps, where qkv and out are stored multiplied."""
    factor = 1.0
    if qkv_largest is not None:
        of_qkv = power_below(tl.load(qkv_largest))
        factor /= of_qkv
        eps *= of_qkv * of_qkv
    if out_largest is not None:
        factor *= power_below(tl.load(out_largest))
    return factor, eps


@triton.jit
def _sum_of_states(
    head_state, token, column, stride, first, last, tokens, dim,
    PRECISION: tl.constexpr, D: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Sum of k v^T `[D, D]` and of k `[D]` over tokens [first, last); `head_state` is at k."""
    state = tl.zeros((D, D), tl.float32)
    keys = tl.zeros((D,), tl.float32)
    for start in range(first, last, BT):
        k = _relu(_rows(head_state, start + token, column, stride, last, dim))
        v = _rows(head_state + dim, start + token, column, stride, last, dim)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
        keys += tl.sum(k.to(tl.float32), axis=0)
    return state, keys


@triton.jit
def _sum_of_parts(states, keys, head, parts, D: tl.constexpr):
    """The states `[D, D]` and keys `[D]` that all programs of a head have left, in order."""
    row = tl.arange(0, D)
    state = tl.zeros((D, D), tl.float32)
    key = tl.zeros((D,), tl.float32)
    for part in range(parts):
        index = (head * parts + part).to(tl.int64)
        state += tl.load(states + index * D * D + row[:, None] * D + row[None, :])
        key += tl.load(keys + index * D + row)
    return state, key


@triton.jit
def _leave_part(states, keys, index, state, key, D: tl.constexpr):
    row = tl.arange(0, D)
    tl.store(states + index.to(tl.int64) * D * D + row[:, None] * D + row[None, :], state)
    tl.store(keys + index.to(tl.int64) * D + row, key)


@triton.jit(do_not_specialize=["tokens", "parts", "share"])
def state_kernel(
    qkv,  # [B, T, heads * 3 * dim]
    states,  # [B * heads * parts, D, D]
    keys,  # [B * heads * parts, D]
    tokens,
    heads,
    dim,
    parts,
    share,  # tokens of a part
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
):
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head = image * heads + head
    stride = heads * 3 * dim
    base = qkv + image.to(tl.int64) * tokens * stride + head * 3 * dim
    first = part * share
    last = tl.minimum(first + share, tokens)
    state, key = _sum_of_states(
        base + dim, tl.arange(0, BT), tl.arange(0, D), stride, first, last, tokens, dim,
        PRECISION, D, BT,
    )  # fmt: skip
    _leave_part(states, keys, of_head * parts + part, state, key, D)


@triton.jit(do_not_specialize=["tokens", "parts", "share", "eps"])
def attention_kernel(
    qkv,  # [B, T, heads * 3 * dim]
    out,  # [B, T, out_channels]
    states,  # parts of the state; None where this program sums it up itself
    keys,
    tokens,
    heads,
    dim,
    parts,
    share,
    eps,
    out_channels,
    first_channel,  # of out that is written
    qkv_largest,  # [1], float32: qkv is stored multiplied by power_below of that; or None
    out_largest,  # [1], likewise out is written so; or None
    PRECISION: tl.constexpr,  # of the sum over tokens
    STATE_PRECISION: tl.constexpr,  # of the product with the state
    D: tl.constexpr,
    BT: tl.constexpr,
):
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head = image * heads + head
    stride = heads * 3 * dim
    token = tl.arange(0, BT)
    column = tl.arange(0, D)
    base = qkv + image.to(tl.int64) * tokens * stride + head * 3 * dim
    out += image.to(tl.int64) * tokens * out_channels + first_channel + head * dim
    factor, eps = _rescaling(qkv_largest, out_largest, eps)
    if states is None:
        state, key = _sum_of_states(
            base + dim, token, column, stride, 0, tokens, tokens, dim, PRECISION, D, BT
        )
    else:
        state, key = _sum_of_parts(states, keys, of_head, parts, D)
    first = part * share
    last = tl.minimum(first + share, tokens)
    for start in range(first, last, BT):
        q = _relu(_rows(base, start + token, column, stride, last, dim)).to(tl.float32)
        above = tl.dot(q, state, input_precision=STATE_PRECISION)
        below = tl.sum(q * key[None, :], axis=1) + eps
        attended = tl.div_rn(above, below[:, None] + tl.zeros_like(above)) * factor
        _store_rows(out, start + token, column, out_channels, last, dim, attended)


@triton.jit(do_not_specialize=["tokens", "eps"])
def scores_kernel(
    qkv,  # [B, T, heads * 3 * dim]
    out,  # [B, T, out_channels]
    tokens,  # at most BT
    heads,
    dim,
    eps,
    out_channels,
    first_channel,
    qkv_largest,  # as for attention_kernel
    out_largest,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
):
    """The form for few tokens: every query with every key."""
    head, image = tl.program_id(1), tl.program_id(2)
    stride = heads * 3 * dim
    token = tl.arange(0, BT)
    column = tl.arange(0, D)
    base = qkv + image.to(tl.int64) * tokens * stride + head * 3 * dim
    q = _relu(_rows(base, token, column, stride, tokens, dim))
    k = _relu(_rows(base + dim, token, column, stride, tokens, dim))
    v = _rows(base + 2 * dim, token, column, stride, tokens, dim)
    factor, eps = _rescaling(qkv_largest, out_largest, eps)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.div_rn(scores, (tl.sum(scores, axis=1) + eps)[:, None] + tl.zeros_like(scores))
    attended = tl.dot(scores, v.to(tl.float32), input_precision=STATE_PRECISION) * factor
    out += image.to(tl.int64) * tokens * out_channels + first_channel + head * dim
    _store_rows(out, token, column, out_channels, tokens, dim, attended)


@triton.jit(do_not_specialize=["tokens", "parts", "share", "eps"])
def query_gradient_kernel(
    qkv,  # [B, T, heads * 3 * dim]
    grad,  # [B, T, heads * dim]
    gradient,  # of qkv: that of q is written
    states,
    keys,
    state_gradients,  # parts, to be written
    key_gradients,
    tokens,
    heads,
    dim,
    parts,
    share,
    eps,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
):
    """With n = q S, m = q z + eps and out = n / m, S and z the state: gradients of q, S and z.

    The two terms of the gradient of q take each other back, wholly where a query has one channel;
    WIDE is the type whose rounding is not seen then.
    """
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head = image * heads + head
    stride = heads * 3 * dim
    token = tl.arange(0, BT)
    column = tl.arange(0, D)
    offset = image.to(tl.int64) * tokens * stride + head * 3 * dim
    grad += image.to(tl.int64) * tokens * heads * dim + head * dim
    state, key = _sum_of_parts(states, keys, of_head, parts, D)
    state, key = state.to(WIDE), key.to(WIDE)
    of_state = tl.zeros((D, D), tl.float32)
    of_key = tl.zeros((D,), tl.float32)
    first = part * share
    last = tl.minimum(first + share, tokens)
    for start in range(first, last, BT):
        q = _relu(_rows(qkv + offset, start + token, column, stride, last, dim)).to(WIDE)
        of_out = _rows(grad, start + token, column, heads * dim, last, dim).to(WIDE)
        above = tl.dot(q, state, input_precision="ieee", out_dtype=WIDE)
        below = tl.sum(q * key[None, :], axis=1) + eps
        of_above = of_out / below[:, None]
        of_below = -tl.sum(of_above * above, axis=1) / below
        of_q = tl.dot(of_above, tl.trans(state), input_precision="ieee", out_dtype=WIDE)
        of_q += of_below[:, None] * key[None, :]
        of_q = tl.where(q > 0, of_q, 0.0)
        _store_rows(gradient + offset, start + token, column, stride, last, dim, of_q)
        of_state = tl.dot(
            tl.trans(q).to(tl.float32), of_above.to(tl.float32), of_state, input_precision="ieee"
        )
        of_key += tl.sum(q * of_below[:, None], axis=0).to(tl.float32)
    _leave_part(state_gradients, key_gradients, of_head * parts + part, of_state, of_key, D)


@triton.jit(do_not_specialize=["tokens", "parts", "share"])
def key_gradient_kernel(
    qkv,  # [B, T, heads * 3 * dim]
    gradient,  # of qkv: those of k and v are written
    state_gradients,
    key_gradients,
    tokens,
    heads,
    dim,
    parts,
    share,
    D: tl.constexpr,
    BT: tl.constexpr,
):
    """Gradients of k and v from those of the sums S = sum of k v^T and z = sum of k."""
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head = image * heads + head
    stride = heads * 3 * dim
    token = tl.arange(0, BT)
    column = tl.arange(0, D)
    of_keys = image.to(tl.int64) * tokens * stride + head * 3 * dim + dim
    of_state, of_key = _sum_of_parts(state_gradients, key_gradients, of_head, parts, D)
    first = part * share
    last = tl.minimum(first + share, tokens)
    for start in range(first, last, BT):
        k = _relu(_rows(qkv + of_keys, start + token, column, stride, last, dim)).to(tl.float32)
        v = _rows(qkv + of_keys + dim, start + token, column, stride, last, dim).to(tl.float32)
        of_k = tl.dot(v, tl.trans(of_state), input_precision="ieee") + of_key[None, :]
        of_k = tl.where(k > 0, of_k, 0.0)
        of_v = tl.dot(k, of_state, input_precision="ieee")
        _store_rows(gradient + of_keys, start + token, column, stride, last, dim, of_k)
        _store_rows(gradient + of_keys + dim, start + token, column, stride, last, dim, of_v)


@triton.jit(do_not_specialize=["tokens", "eps"])
def scores_gradient_kernel(
    qkv,  # [B, T, heads * 3 * dim]
    grad,  # [B, T, heads * dim]
    gradient,  # of qkv
    tokens,  # at most BT
    heads,
    dim,
    eps,
    D: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradient of the form for few tokens."""
    head, image = tl.program_id(1), tl.program_id(2)
    stride = heads * 3 * dim
    token = tl.arange(0, BT)
    column = tl.arange(0, D)
    offset = image.to(tl.int64) * tokens * stride + head * 3 * dim
    grad += image.to(tl.int64) * tokens * heads * dim + head * dim
    q = _relu(_rows(qkv + offset, token, column, stride, tokens, dim)).to(tl.float32)
    k = _relu(_rows(qkv + offset + dim, token, column, stride, tokens, dim)).to(tl.float32)
    v = _rows(qkv + offset + 2 * dim, token, column, stride, tokens, dim).to(tl.float32)
    of_out = _rows(grad, token, column, heads * dim, tokens, dim).to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    below = (tl.sum(scores, axis=1) + eps)[:, None] + tl.zeros_like(scores)
    weights = tl.div_rn(scores, below)
    of_v = tl.dot(tl.trans(weights), of_out, input_precision="ieee")
    of_weights = tl.dot(of_out, tl.trans(v), input_precision="ieee")
    of_scores = of_weights - tl.sum(of_weights * weights, axis=1)[:, None]
    of_scores = tl.div_rn(of_scores, below)
    # Rows past the last token have no queries and, with eps alone below them, no end.
    of_scores = tl.where((token < tokens)[:, None], of_scores, 0.0)
    of_q = tl.where(q > 0, tl.dot(of_scores, k, input_precision="ieee"), 0.0)
    of_k = tl.where(k > 0, tl.dot(tl.trans(of_scores), q, input_precision="ieee"), 0.0)
    gradient += offset
    _store_rows(gradient, token, column, stride, tokens, dim, of_q)
    _store_rows(gradient + dim, token, column, stride, tokens, dim, of_k)
    _store_rows(gradient + 2 * dim, token, column, stride, tokens, dim, of_v)


def product_precision(dtype: torch.dtype) -> tuple[str, str]:
    """How products of operands of `dtype`, and of those with float32 sums, are computed.

    Half precision keeps the sums' own precision; for float32 it is PyTorch's setting that decides.
    """
    if dtype != torch.float32:
        # The tensor cores of AMD's GPUs split no operands into TF32.
        return "tf32", "ieee" if torch.version.hip else "tf32x3"
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return precision, precision


class _Shape:
    """Sizes of a call, and how heads are shared out."""

    def __init__(self, qkv: Tensor, head_dim: int) -> None:
        batch, channels, height, width = qkv.shape
        self.tokens = height * width
        self.heads = channels // (3 * head_dim)
        self.dim = head_dim
        self.batch = batch
        self.padded = max(16, triton.next_power_of_2(head_dim))
        wanted = triton.cdiv(2 * limits(qkv).multiprocessors, batch * self.heads)
        fitting = max(1, min(wanted, self.tokens // (2 * _TOKENS)))
        self.share = triton.cdiv(triton.cdiv(self.tokens, fitting), _TOKENS) * _TOKENS
        self.parts = triton.cdiv(self.tokens, self.share)  # Whole tiles may take fewer parts.

    def grid(self, parts: int) -> tuple[int, int, int]:
        """A program for each part of every head."""
        return parts, self.heads, self.batch

    def parts_of_states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for a state and keys of every part."""
        count, size = self.batch * self.heads * self.parts, self.padded
        memory: dict[str, Any] = {"dtype": torch.float32, "device": like.device}
        return (
            unwritten(torch.empty(count, size, size, **memory)),
            unwritten(torch.empty(count, size, **memory)),
        )

    def sum_states(self, qkv: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        """The parts of the state of every head."""
        states, keys = self.parts_of_states(qkv)
        state_kernel[self.grid(self.parts)](
            qkv,
            states,
            keys,
            self.tokens,
            self.heads,
            self.dim,
            self.parts,
            self.share,
            PRECISION=precision,
            D=self.padded,
            BT=_TOKENS,
            num_warps=4,
        )
        return states, keys


def attend(
    qkv: Tensor,  # [B, heads * 3 * dim, H, W], dense NHWC
    head_dim: int,
    eps: float,
    out: Tensor,  # [B, C, H, W], dense NHWC
    first_channel: int = 0,
    qkv_largest: Tensor | None = None,  # [1]
    out_largest: Tensor | None = None,  # [1]
) -> None:
    """Write the attention to channels `first_channel` and on of `out`.

    `qkv_largest` and `out_largest` are as for `conv_act`.
    """
    shape = _Shape(qkv, head_dim)
    precision, state_precision = product_precision(qkv.dtype)
    written = (out.shape[1], first_channel, qkv_largest, out_largest)
    tile = {
        "PRECISION": precision,
        "STATE_PRECISION": state_precision,
        "D": shape.padded,
        "num_warps": 4,
        **_SAME_IN_ALL_LANES,
    }
    if shape.tokens <= head_dim:
        scores_kernel[shape.grid(1)](
            qkv,
            out,
            shape.tokens,
            shape.heads,
            head_dim,
            eps,
            *written,
            BT=max(16, triton.next_power_of_2(shape.tokens)),
            **tile,
        )
        return
    states, keys = (None, None) if shape.parts == 1 else shape.sum_states(qkv, precision)
    attention_kernel[shape.grid(shape.parts)](
        qkv,
        out,
        states,
        keys,
        shape.tokens,
        shape.heads,
        head_dim,
        shape.parts,
        shape.share,
        eps,
        *written,
        BT=_TOKENS,
        **tile,
    )


def relu_linear_attention(
    qkv: Tensor,  # [B, heads * 3 * dim, H, W]
    head_dim: int,
    eps: float = 1e-15,
) -> Tensor:  # [B, heads * dim, H, W]
    """Linear attention with the kernel relu(q) . relu(k), per head; sums in float32."""
    batch, channels, height, width = qkv.shape
    out = empty_channels_last(qkv, (batch, channels // 3, height, width))
    if batch > 0:
        attend(channels_last(qkv), head_dim, eps, out)
    return out


def relu_linear_attention_backward(
    grad: Tensor,  # [B, heads * dim, H, W]
    wanted: Sequence[bool],
    operands: Sequence[Any],
) -> list[Tensor]:
    """The gradient of qkv `[B, heads * 3 * dim, H, W]`, where it is wanted.

    Nothing is kept from the forward pass but qkv; the state is computed again.
    """
    if not wanted[0]:
        return []
    qkv, head_dim, eps = operands
    if qkv.numel() == 0:
        return [torch.zeros_like(qkv, memory_format=torch.contiguous_format)]
    qkv, grad = channels_last(qkv), channels_last(grad.to(qkv.dtype))
    shape = _Shape(qkv, head_dim)
    gradient = empty_channels_last(qkv, qkv.shape)
    if shape.tokens <= head_dim:
        scores_gradient_kernel[shape.grid(1)](
            qkv,
            grad,
            gradient,
            shape.tokens,
            shape.heads,
            head_dim,
            eps,
            D=shape.padded,
            BT=max(16, triton.next_power_of_2(shape.tokens)),
            num_warps=4,
            **_SAME_IN_ALL_LANES,
        )
        return [gradient.contiguous()]
    states, keys = shape.sum_states(qkv, "ieee")
    state_gradients, key_gradients = shape.parts_of_states(qkv)
    grid = shape.grid(shape.parts)
    sizes = (shape.tokens, shape.heads, head_dim, shape.parts, shape.share)
    tile = {"D": shape.padded, "BT": 16, "num_warps": 4, **_SAME_IN_ALL_LANES}
    query_gradient_kernel[grid](
        qkv,
        grad,
        gradient,
        states,
        keys,
        state_gradients,
        key_gradients,
        *sizes,
        eps,
        WIDE=tl.float64 if qkv.dtype == torch.float32 else tl.float32,
        **tile,
    )
    key_gradient_kernel[grid](qkv, gradient, state_gradients, key_gradients, *sizes, **tile)
    return [gradient.contiguous()]
