"""Triton kernels of the usual kinds, which the executor is tested with."""

import triton
import triton.language as tl


@triton.jit
def gemm(
    a,
    b,
    c,
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c [rows, columns] = a [rows, depth] b [depth, columns]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        part_a = tl.load(
            a + row[:, None] * depth + k[None, :],
            mask=(row[:, None] < rows) & (k[None, :] < depth),
            other=0.0,
        )
        part_b = tl.load(
            b + k[:, None] * columns + column[None, :],
            mask=(k[:, None] < depth) & (column[None, :] < columns),
            other=0.0,
        )
        sums = tl.dot(part_a, part_b, sums, input_precision=PRECISION)
    tl.store(
        c + row[:, None] * columns + column[None, :],
        sums.to(c.dtype.element_ty),
        mask=(row[:, None] < rows) & (column[None, :] < columns),
    )


@triton.jit
def softmax(x, y, columns, COLUMNS: tl.constexpr):
    """Softmax of one row of x [rows, columns]."""
    column = tl.arange(0, COLUMNS)
    offset = tl.program_id(0) * columns + column
    values = tl.load(x + offset, mask=column < columns, other=float("-inf")).to(tl.float32)
    powers = tl.exp(values - tl.max(values, axis=0))
    result = powers / tl.sum(powers, axis=0)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=column < columns)


@triton.jit
def layer_norm(x, weight, bias, y, columns, eps, COLUMNS: tl.constexpr):
    """Layer norm of one row of x [rows, columns]."""
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    offset = tl.program_id(0) * columns + column
    values = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / columns
    difference = tl.where(inside, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(difference * difference, axis=0) / columns + eps)
    scaled = difference * scale * tl.load(weight + column, mask=inside, other=0.0)
    result = scaled + tl.load(bias + column, mask=inside, other=0.0)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def attention(q, k, v, out, tokens, scale, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """softmax(q k^T scale) v of one tile of queries; q, k, v, out [heads, tokens, WIDTH]."""
    head = tl.program_id(1) * tokens * WIDTH
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    where = head + query[:, None] * WIDTH + d[None, :]
    queries = tl.load(q + where, mask=query[:, None] < tokens, other=0.0)
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    weight = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    for first in range(0, tokens, TILE):
        key = first + tl.arange(0, TILE)
        keys = tl.load(
            k + head + key[None, :] * WIDTH + d[:, None], mask=key[None, :] < tokens, other=0.0
        )
        values = tl.load(
            v + head + key[:, None] * WIDTH + d[None, :], mask=key[:, None] < tokens, other=0.0
        )
        scores = tl.dot(queries, keys) * scale
        scores = tl.where(key[None, :] < tokens, scores, float("-inf"))
        next_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp(largest - next_largest)
        powers = tl.exp(scores - next_largest[:, None])
        weight = weight * shrink + tl.sum(powers, axis=1)
        sums = sums * shrink[:, None] + tl.dot(powers.to(values.dtype), values)
        largest = next_largest
    result = sums / weight[:, None]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=query[:, None] < tokens)


@triton.jit
def histogram(values, counts, n, BLOCK: tl.constexpr):
    """counts[v] += how often v occurs in values [n]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + i, mask=i < n, other=0)
    tl.atomic_add(counts + value, 1, mask=i < n)


@triton.jit
def total(x, parts, n, BLOCK: tl.constexpr):
    """parts[block] = sum of the block's share of x [n]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(parts + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n, other=0.0), axis=0))
