"""Integers, moves and comparisons, one by one, against NumPy and Python's integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.ptx import evaluate

COUNT = 1024
EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF]
EDGES += [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000]
EDGES += [0xFFFFFFFFFFFFFFFF, 0x123456789ABCDEF0]


def integers(dtype: str, seed: int, largest: int | None = None) -> np.ndarray[Any, Any]:
    """Random values of every magnitude, and edges."""
    rng = np.random.default_rng(seed)
    width = 8 * np.dtype(dtype).itemsize
    values = [
        int(v) >> int(s)
        for v, s in zip(rng.integers(0, 1 << 63, COUNT), rng.integers(0, 63, COUNT), strict=True)
    ]
    values[: len(EDGES)] = rng.permutation(np.array(EDGES, object))
    values = [(v * (1 if seed % 2 else -1)) % (1 << width) for v in values]
    if largest is not None:
        values = [v % (largest + 1) for v in values]
    return np.array(values, f"u{width // 8}").view(dtype)


def check(code: str, out: str, f: Callable[..., int], *inputs: np.ndarray[Any, Any]) -> None:
    """The instruction agrees with `f` on Python's integers, modulo the width of the result."""
    width = 8 * np.dtype(out).itemsize
    got = evaluate(code, f"u{width // 8}", *inputs)
    rows = zip(*(map(int, array) for array in inputs), strict=True)
    want = np.array([f(*row) % (1 << width) for row in rows], f"u{width // 8}")
    np.testing.assert_array_equal(got, want)


def trunc_div(a: int, b: int) -> int:
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]
NUMPY = {name: f"{'i' if name[0] == 's' else 'u'}{int(name[1:]) // 8}" for name in TYPES}


@pytest.mark.parametrize("ptx_type", TYPES)
def test_arithmetic(ptx_type: str) -> None:
    dtype = NUMPY[ptx_type]
    width = int(ptx_type[1:])
    a, b, c = (integers(dtype, seed) for seed in range(3))
    nonzero = np.where(b == 0, 1, b).astype(dtype)
    check(f"add.{ptx_type} out, a, b;", dtype, lambda x, y: x + y, a, b)
    check(f"sub.{ptx_type} out, a, b;", dtype, lambda x, y: x - y, a, b)
    check(f"mul.lo.{ptx_type} out, a, b;", dtype, lambda x, y: x * y, a, b)
    check(f"mul.hi.{ptx_type} out, a, b;", dtype, lambda x, y: x * y >> width, a, b)
    check(f"mad.lo.{ptx_type} out, a, b, c;", dtype, lambda x, y, z: x * y + z, a, b, c)
    check(f"mad.hi.{ptx_type} out, a, b, c;", dtype, lambda x, y, z: (x * y >> width) + z, a, b, c)
    check(f"div.{ptx_type} out, a, b;", dtype, trunc_div, a, nonzero)
    check(f"rem.{ptx_type} out, a, b;", dtype, lambda x, y: x - y * trunc_div(x, y), a, nonzero)
    check(f"min.{ptx_type} out, a, b;", dtype, min, a, b)
    check(f"max.{ptx_type} out, a, b;", dtype, max, a, b)
    check(f"neg.{ptx_type} out, a;", dtype, lambda x: -x, a)
    if ptx_type[0] == "s":
        check(f"abs.{ptx_type} out, a;", dtype, abs, a)


@pytest.mark.parametrize("ptx_type", ["u16", "s16", "u32", "s32"])
def test_wide_products(ptx_type: str) -> None:
    dtype = NUMPY[ptx_type]
    wide = f"{dtype[0]}{2 * int(dtype[1:])}"
    a, b, c = integers(dtype, 0), integers(dtype, 1), integers(wide, 2)
    check(f"mul.wide.{ptx_type} out, a, b;", wide, lambda x, y: x * y, a, b)
    check(f"mad.wide.{ptx_type} out, a, b, c;", wide, lambda x, y, z: x * y + z, a, b, c)


def test_saturation_and_24_bits() -> None:
    a, b, c = (integers("i4", seed) for seed in range(3))

    def clamp(value: int) -> int:
        return max(-(1 << 31), min((1 << 31) - 1, value))

    def low_24(value: int) -> int:
        return (value & 0xFFFFFF) - (1 << 24 if value & 0x800000 else 0)

    check("add.sat.s32 out, a, b;", "i4", lambda x, y: clamp(x + y), a, b)
    check("sub.sat.s32 out, a, b;", "i4", lambda x, y: clamp(x - y), a, b)
    check("mad.hi.sat.s32 out, a, b, c;", "i4", lambda x, y, z: clamp((x * y >> 32) + z), a, b, c)
    check("mul24.lo.s32 out, a, b;", "i4", lambda x, y: low_24(x) * low_24(y), a, b)
    check("mul24.hi.s32 out, a, b;", "i4", lambda x, y: low_24(x) * low_24(y) >> 16, a, b)
    check("mul24.lo.u32 out, a, b;", "u4", lambda x, y: (x & 0xFFFFFF) * (y & 0xFFFFFF), a, b)
    check("mad24.lo.s32 out, a, b, c;", "i4", lambda x, y, z: low_24(x) * low_24(y) + z, a, b, c)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic_and_shifts(width: int) -> None:
    dtype = f"u{width // 8}"
    a, b = integers(dtype, 0), integers(dtype, 1)
    n = integers("u4", 2, 80)
    check(f"and.b{width} out, a, b;", dtype, lambda x, y: x & y, a, b)
    check(f"or.b{width} out, a, b;", dtype, lambda x, y: x | y, a, b)
    check(f"xor.b{width} out, a, b;", dtype, lambda x, y: x ^ y, a, b)
    check(f"not.b{width} out, a;", dtype, lambda x: ~x, a)
    check(f"cnot.b{width} out, a;", dtype, lambda x: x == 0, a)
    check(f"shl.b{width} out, a, b;", dtype, lambda x, y: x << y, a, n)
    check(f"shr.u{width} out, a, b;", dtype, lambda x, y: x >> y, a, n)
    check(f"shr.s{width} out, a, b;", dtype, lambda x, y: x >> y, a.view(f"i{width // 8}"), n)


@pytest.mark.parametrize("width", [32, 64])
def test_bits(width: int) -> None:
    dtype = f"u{width // 8}"
    signed = f"i{width // 8}"
    a, b = integers(dtype, 0), integers(dtype, 1)
    position, length = integers("u4", 2, 70), integers("u4", 3, 70)

    def highest(x: int) -> int:
        return (x if x >= 0 else ~x).bit_length() - 1

    def extract(x: int, at: int, n: int) -> int:
        return x >> at & ((1 << n) - 1)

    def extract_signed(x: int, at: int, n: int) -> int:
        if n == 0:
            return 0
        top = min(at + n - 1, width - 1)
        field = [x >> i & 1 for i in range(at, min(at + n, width))]
        sign = x >> top & 1
        field += [sign] * (width - len(field))
        return sum(bit << i for i, bit in enumerate(field))

    def insert(x: int, into: int, at: int, n: int) -> int:
        mask = ((1 << n) - 1) << at & ((1 << width) - 1)
        return (into & ~mask) | (x << at & mask)

    check(f"popc.b{width} out, a;", "u4", int.bit_count, a)
    check(f"clz.b{width} out, a;", "u4", lambda x: width - x.bit_length(), a)
    check(f"brev.b{width} out, a;", dtype, lambda x: int(f"{x:0{width}b}"[::-1], 2), a)
    check(f"bfind.u{width} out, a;", "u4", highest, a)
    check(f"bfind.s{width} out, a;", "u4", highest, a.view(signed))
    check(f"bfe.u{width} out, a, b, c;", dtype, extract, a, position, length)
    check(f"bfe.s{width} out, a, b, c;", dtype, extract_signed, a.view(signed), position, length)
    check(f"bfi.b{width} out, a, b, c, d;", dtype, insert, a, b, position, length)


def test_bytes_and_tables() -> None:
    a, b, c = (integers("u4", seed) for seed in range(3))
    n = integers("u4", 4, 70)
    selector = integers("u4", 5, 0xFFFF)

    def permute(x: int, y: int, s: int) -> int:
        source = (y << 32 | x).to_bytes(8, "little")
        out = [source[s >> 4 * i & 7] for i in range(4)]
        out = [(0xFF if v & 0x80 else 0) if s >> 4 * i & 8 else v for i, v in enumerate(out)]
        return int.from_bytes(bytes(out), "little")

    def table(x: int, y: int, z: int) -> int:
        result = 0
        for i in range(32):
            index = (x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)
            result |= (0xE2 >> index & 1) << i
        return result

    def dot(x: int, y: int, z: int) -> int:
        parts = zip(x.to_bytes(4, "little"), y.to_bytes(4, "little"), strict=True)
        return z + sum(p * (q - 256 if q > 127 else q) for p, q in parts)

    check("prmt.b32 out, a, b, c;", "u4", permute, a, b, selector)
    check("prmt.b32.f4e out, a, b, c;", "u4", lambda x, y, s: (y << 32 | x) >> 8 * (s & 3), a, b, c)
    check("lop3.b32 out, a, b, c, 0xE2;", "u4", table, a, b, c)
    check(
        "shf.l.wrap.b32 out, a, b, c;",
        "u4",
        lambda x, y, s: (y << 32 | x) << (s & 31) >> 32,
        a,
        b,
        n,
    )
    check(
        "shf.r.clamp.b32 out, a, b, c;", "u4", lambda x, y, s: (y << 32 | x) >> min(s, 32), a, b, n
    )
    check("sad.u32 out, a, b, c;", "u4", lambda x, y, z: abs(x - y) + z, a, b, c)
    check("dp4a.u32.s32 out, a, b, c;", "u4", dot, a, b, c)


def test_carries() -> None:
    a, b, c, d = (integers("u8", seed) for seed in range(4))
    code = """.reg .b64 low;
    add.cc.u64 low, a, c;
    addc.u64 out, b, d;"""
    check(code, "u8", lambda w, x, y, z: (w + y >> 64) + x + z, a, b, c, d)
    code = """.reg .b64 low;
    sub.cc.u64 low, a, c;
    subc.u64 out, b, d;"""
    check(code, "u8", lambda w, x, y, z: x - z - (w < y), a, b, c, d)
    code = """.reg .b32 low, hi_a, low_a, hi_b, low_b;
    mov.b64 {low_a, hi_a}, a;
    mov.b64 {low_b, hi_b}, b;
    mad.lo.cc.u32 low, low_a, low_b, hi_b;
    madc.hi.u32 out, low_a, low_b, hi_a;"""
    m = 0xFFFFFFFF
    check(
        code,
        "u4",
        lambda x, y: ((x & m) * (y & m) + (y >> 32) >> 32) + (x >> 32),
        a,
        b,
    )


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("ptx_type", [*TYPES, "f16", "f32", "f64"])
def test_comparisons(name: str, ptx_type: str) -> None:
    bits = int(ptx_type[1:])
    dtype = f"f{bits // 8}" if ptx_type[0] == "f" else NUMPY[ptx_type]
    a, b = integers(f"u{bits // 8}", 0).view(dtype), integers(f"u{bits // 8}", 1).view(dtype)
    b[::3] = a[::3]
    code = f"setp.{{}}.{ptx_type} %p1, a, b; selp.u32 out, 1, 0, %p1;"
    want = COMPARISONS[name](a, b)
    if name == "ne" and dtype[0] == "f":
        want &= ~(np.isnan(a) | np.isnan(b))
    np.testing.assert_array_equal(evaluate(code.format(name), "u4", a, b), want)
    if dtype[0] == "f":
        unordered = np.isnan(a) | np.isnan(b)
        got = evaluate(code.format(name + "u"), "u4", a, b)
        np.testing.assert_array_equal(got, want | unordered)
        np.testing.assert_array_equal(evaluate(code.format("nan"), "u4", a, b), unordered)
        np.testing.assert_array_equal(evaluate(code.format("num"), "u4", a, b), ~unordered)


def test_comparisons_joined_and_doubled() -> None:
    a, b, c = (integers("i4", seed) for seed in range(3))
    code = """setp.gt.s32 %p3, c, 0;
    setp.lt.xor.s32 %p1|%p2, a, b, !%p3;
    selp.u32 %r5, 1, 0, %p1;
    selp.u32 %r6, 2, 0, %p2;
    or.b32 out, %r5, %r6;"""
    check(code, "u4", lambda x, y, z: ((x < y) != (z <= 0)) + 2 * ((x >= y) != (z <= 0)), a, b, c)
    code = "set.lt.u32.s32 out, a, b;"
    check(code, "u4", lambda x, y: -(x < y), a, b)
    check("slct.u32.s32 out, a, b, c;", "u4", lambda x, y, z: x if z >= 0 else y, a, b, c)


def test_packing() -> None:
    a, b = integers("u4", 0), integers("u4", 1)
    check("mov.b64 out, {a, b};", "u8", lambda x, y: y << 32 | x, a, b)
    code = ".reg .b16 x, y; mov.b32 {x, y}, a; mov.b32 out, {y, x};"
    check(code, "u4", lambda x: x >> 16 | x << 16, a)


def test_constants() -> None:
    a = integers("u4", 0)
    check("xor.b32 out, a, 0b1010;", "u4", lambda x: x ^ 10, a)
    check("xor.b32 out, a, 017;", "u4", lambda x: x ^ 15, a)
    check("xor.b32 out, a, 0x1FU;", "u4", lambda x: x ^ 31, a)
    check("mov.f32 out, 0f3F800000;", "u4", lambda x: 0x3F800000, a)
    check("mov.f32 out, 1.5;", "u4", lambda x: 0x3FC00000, a)
    check("mov.f64 out, 0d3FF0000000000000;", "u8", lambda x: 0x3FF0000000000000, a)
    check("add.s32 out, a, -1;", "u4", lambda x: x - 1, a)


@pytest.mark.parametrize(("source", "size"), [("u8", 1), ("s8", 1), ("u16", 2), ("s16", 2)])
def test_narrow_loads_extend(source: str, size: int) -> None:
    a = integers(f"{'i' if source[0] == 's' else 'u'}{size}", 0)
    out = evaluate(f"ld.global.{source} out, [at_a];", "i4", a)
    np.testing.assert_array_equal(out, a.astype("i4"))


def test_wide_accesses() -> None:
    a = np.arange(1024, dtype="u4")
    code = """.reg .b64 vector;
    and.b32 %r3, i, 255;
    mad.wide.u32 vector, %r3, 16, pa_start;
    ld.global.v4.u32 {%r4, %r5, _, %r7}, [vector];
    add.u32 out, %r4, %r7;
    add.u32 out, out, %r5;"""
    code = ".reg .b64 pa_start; ld.param.u64 pa_start, [pa];" + code
    first = np.arange(1024) % 256 * 4
    np.testing.assert_array_equal(evaluate(code, "u4", a), 3 * first + 4)


def test_special_registers() -> None:
    lanes = np.arange(256)
    for name, want in {
        "%tid.x": lanes % 128,
        "%ctaid.x": lanes // 128,
        "%ntid.x": np.full(256, 128),
        "%nctaid.x": np.full(256, 2),
        "%laneid": lanes % 32,
        "%warpid": lanes % 128 // 32,
        "%lanemask_lt": (1 << lanes % 32) - 1,
    }.items():
        got = evaluate(f"mov.u32 out, {name};", "u4", np.zeros(256, "u4"))
        np.testing.assert_array_equal(got, want, err_msg=name)
