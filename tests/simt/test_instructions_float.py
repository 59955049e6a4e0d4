"""Floating-point instructions, against exact arithmetic and one rounding."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
import pytest

from tests.support.ptx import evaluate
from tests.support.rounding import BF16, F16, F32, TF32, Format, is_special

COUNT = 512
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32}
UNSIGNED = {"f16": "u2", "bf16": "u2", "f32": "u4", "f64": "u8"}
NAN_OF = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}
MODES = ["rn", "rz", "rm", "rp"]

Bits = np.ndarray[Any, Any]


def numbers(form: Format, seed: int) -> Bits:
    """Bits of numbers: random ones, special ones, and those next to a power of two."""
    rng = np.random.default_rng(seed)
    top = 1 << (form.bits - 1)
    infinity = ((1 << form.exponent_bits) - 1) << form.mantissa_bits
    one = form.bias << form.mantissa_bits
    special = [0, 1, 2, (1 << form.mantissa_bits) - 1, 1 << form.mantissa_bits, one - 1, one]
    special += [one + 1, one + 2, infinity - 1, infinity, infinity + 1]
    special += [top | v for v in special]
    values = rng.integers(0, 2 * top, COUNT)
    # Exponents near each other, so that sums round and cancel.
    near = rng.integers(one - (3 << form.mantissa_bits), one + (3 << form.mantissa_bits), COUNT)
    values[::2] = near[::2] | rng.integers(0, 2, COUNT)[::2] * top
    values[: len(special)] = rng.permutation(special)
    return values.astype(f"u{form.bits // 8}")


def flush(form: Format, bits: int) -> int:
    exponent = bits >> form.mantissa_bits & ((1 << form.exponent_bits) - 1)
    return bits if exponent else bits & (1 << (form.bits - 1))


def sum_of(form: Format, a: int, b: int, mode: str) -> int | None:
    """The bits of a sum; None for NaN."""
    x, y = form.decode(a), form.decode(b)
    infinity = ((1 << form.exponent_bits) - 1) << form.mantissa_bits
    sign = 1 << (form.bits - 1)
    if is_special(x) or is_special(y):
        total = float(x if is_special(x) else 0) + float(y if is_special(y) else 0)
        if total != total:
            return None
        return infinity | (sign if total < 0 else 0)
    assert isinstance(x, Fraction | int) and isinstance(y, Fraction | int)
    if x + y == 0:
        both = (a & b & sign) if x == 0 else 0
        either = a & sign if x == 0 and (a ^ b) & sign == 0 else (sign if mode == "rm" else 0)
        return both or either
    return form.round(Fraction(x + y), mode)


def product_of(form: Format, a: int, b: int, mode: str) -> int | None:
    x, y = form.decode(a), form.decode(b)
    infinity = ((1 << form.exponent_bits) - 1) << form.mantissa_bits
    sign = (a ^ b) & (1 << (form.bits - 1))
    if x != x or y != y:
        return None
    if is_special(x) or is_special(y):
        return None if x == 0 or y == 0 else infinity | sign
    return form.round(Fraction(x) * Fraction(y), mode, negative_zero=bool(sign))


def fused(form: Format, a: int, b: int, c: int, mode: str) -> int | None:
    """a b + c, rounded once."""
    sign = 1 << (form.bits - 1)
    product = product_of(form, a, b, "rn")
    x, y, z = form.decode(a), form.decode(b), form.decode(c)
    if product is None or z != z:
        return None
    if is_special(x) or is_special(y):
        return sum_of(form, product, c, mode)
    if is_special(z):
        return c
    total = Fraction(x) * Fraction(y) + Fraction(z)
    if total:
        return form.round(total, mode)
    negative_product = (a ^ b) & sign
    if Fraction(z) == 0 and negative_product == c & sign:
        return c
    return sign if mode == "rm" else 0


def check(code: str, kind: str, f: Callable[..., int | None], *inputs: Bits) -> None:
    got = evaluate(code, UNSIGNED[kind], *inputs)
    want = [f(*(int(v) for v in row)) for row in zip(*inputs, strict=True)]
    expected = np.array([NAN_OF[kind] if v is None else v for v in want], UNSIGNED[kind])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_f32_rounds_once_in_every_direction(mode: str) -> None:
    a, b, c = (numbers(F32, seed) for seed in range(3))
    sign = 1 << 31
    check(f"add.{mode}.f32 out, a, b;", "f32", lambda x, y: sum_of(F32, x, y, mode), a, b)
    check(f"sub.{mode}.f32 out, a, b;", "f32", lambda x, y: sum_of(F32, x, y ^ sign, mode), a, b)
    check(f"mul.{mode}.f32 out, a, b;", "f32", lambda x, y: product_of(F32, x, y, mode), a, b)
    check(f"fma.{mode}.f32 out, a, b, c;", "f32", lambda *v: fused(F32, *v, mode), a, b, c)


@pytest.mark.parametrize("mode", MODES)
def test_f32_division_and_roots(mode: str) -> None:
    a, b = numbers(F32, 0), numbers(F32, 1)

    def finite(x: int) -> bool:
        return not is_special(F32.decode(x)) and F32.decode(x) != 0

    a = np.array([x for x in a.tolist() if finite(x)][:256], "u4")
    b = np.array([x for x in b.tolist() if finite(x)][:256], "u4")

    def quotient(x: int, y: int) -> int:
        return F32.round(Fraction(F32.decode(x)) / Fraction(F32.decode(y)), mode)

    def root(x: int) -> int:
        value = Fraction(F32.decode(x & 0x7FFFFFFF))
        # Exact to a bit far below the last, with a sticky one beneath.
        scaled = value * Fraction(2) ** 400
        floor = isqrt(int(scaled))
        exact = floor * floor == scaled
        return F32.round(Fraction(2 * floor + (not exact), 2) / Fraction(2) ** 200, mode)

    check(f"div.{mode}.f32 out, a, b;", "f32", quotient, a, b)
    check(f"rcp.{mode}.f32 out, a;", "f32", lambda x: quotient(0x3F800000, x), a)
    check(f"and.b32 a, a, 0x7fffffff; sqrt.{mode}.f32 out, a;", "f32", root, a)


def test_flushing_and_saturation() -> None:
    a, b, c = (numbers(F32, seed) for seed in range(3))

    def ftz(f: Callable[..., int | None]) -> Callable[..., int | None]:
        def flushed(*values: int) -> int | None:
            result = f(*(flush(F32, v) for v in values))
            return None if result is None else flush(F32, result)

        return flushed

    def sat(f: Callable[..., int | None]) -> Callable[..., int | None]:
        def saturated(*values: int) -> int:
            result = f(*values)
            if result is None or result >> 31:
                return 0
            return min(result, 0x3F800000)

        return saturated

    def add(x: int, y: int) -> int | None:
        return sum_of(F32, x, y, "rn")

    def multiply(x: int, y: int) -> int | None:
        return product_of(F32, x, y, "rn")

    def multiply_add(x: int, y: int, z: int) -> int | None:
        return fused(F32, x, y, z, "rn")

    check("add.ftz.f32 out, a, b;", "f32", ftz(add), a, b)
    check("add.sat.f32 out, a, b;", "f32", sat(add), a, b)
    check("mul.ftz.f32 out, a, b;", "f32", ftz(multiply), a, b)
    check("mul.ftz.sat.f32 out, a, b;", "f32", sat(ftz(multiply)), a, b)
    check("fma.rn.ftz.f32 out, a, b, c;", "f32", ftz(multiply_add), a, b, c)
    check("fma.rn.sat.f32 out, a, b, c;", "f32", sat(multiply_add), a, b, c)
    check("fma.rz.ftz.f32 out, a, b, c;", "f32", ftz(lambda *v: fused(F32, *v, "rz")), a, b, c)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_round_once(kind: str) -> None:
    form = FORMATS[kind]
    a, b, c = (numbers(form, seed) for seed in range(3))

    def relu(f: Callable[..., int | None]) -> Callable[..., int | None]:
        def clipped(*values: int) -> int | None:
            result = f(*values)
            return 0 if result is not None and result >> 15 else result

        return clipped

    def multiply_add(x: int, y: int, z: int) -> int | None:
        return fused(form, x, y, z, "rn")

    check(f"add.{kind} out, a, b;", kind, lambda x, y: sum_of(form, x, y, "rn"), a, b)
    check(f"sub.{kind} out, a, b;", kind, lambda x, y: sum_of(form, x, y ^ 0x8000, "rn"), a, b)
    check(f"mul.{kind} out, a, b;", kind, lambda x, y: product_of(form, x, y, "rn"), a, b)
    check(f"fma.rn.{kind} out, a, b, c;", kind, multiply_add, a, b, c)
    check(f"fma.rn.relu.{kind} out, a, b, c;", kind, relu(multiply_add), a, b, c)
    check(f"neg.{kind} out, a;", kind, lambda x: x ^ 0x8000, a)
    check(f"abs.{kind} out, a;", kind, lambda x: x & 0x7FFF, a)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_are_two_halves(kind: str) -> None:
    form = FORMATS[kind]
    a, b, c = (numbers(form, seed) for seed in range(3))
    for code, inputs in {
        "add.{} out, a, b;": [a, b],
        "mul.{} out, a, b;": [a, b],
        "fma.rn.{} out, a, b, c;": [a, b, c],
        "max.{} out, a, b;": [a, b],
        "neg.{} out, a;": [a],
    }.items():
        single = evaluate(code.format(kind), "u2", *inputs)
        pairs = [np.ascontiguousarray(v).view("u4") for v in inputs]
        packed = evaluate(code.format(kind + "x2"), "u4", *pairs)
        np.testing.assert_array_equal(packed.view("u2"), single)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("largest", [False, True])
def test_extrema(kind: str, largest: bool) -> None:
    form = FORMATS[kind]
    a, b = numbers(form, 0), numbers(form, 1)
    b[::5] = a[::5] ^ (1 << (form.bits - 1))

    def order(x: int) -> tuple[Fraction | float, bool]:
        return form.decode(x), not x >> (form.bits - 1)  # -0 before +0

    def pick(x: int, y: int) -> int | None:
        if form.decode(x) != form.decode(x):
            return None if form.decode(y) != form.decode(y) else y
        if form.decode(y) != form.decode(y):
            return x
        return max(x, y, key=order) if largest else min(x, y, key=order)

    def pick_or_nan(x: int, y: int) -> int | None:
        missing = form.decode(x) != form.decode(x) or form.decode(y) != form.decode(y)
        return None if missing else pick(x, y)

    name = "max" if largest else "min"
    check(f"{name}.{kind} out, a, b;", kind, pick, a, b)
    check(f"{name}.NaN.{kind} out, a, b;", kind, pick_or_nan, a, b)


@pytest.mark.parametrize(("kind", "one"), [("f16", 0x3C00), ("bf16", 0x3F80)])
def test_comparisons_of_halves_into_registers(kind: str, one: int) -> None:
    form = FORMATS[kind]
    a, b = numbers(form, 0), numbers(form, 1)
    b[::3] = a[::3]
    less = [form.decode(int(x)) < form.decode(int(y)) for x, y in zip(a, b, strict=True)]
    single = np.where(less, one, 0).astype("u2")
    np.testing.assert_array_equal(evaluate(f"set.lt.{kind}.{kind} out, a, b;", "u2", a, b), single)
    packed = evaluate(f"set.lt.{kind}x2.{kind}x2 out, a, b;", "u4", a.view("u4"), b.view("u4"))
    np.testing.assert_array_equal(packed.view("u2"), single)
    packed = evaluate(f"set.lt.u32.{kind}x2 out, a, b;", "u4", a.view("u4"), b.view("u4"))
    np.testing.assert_array_equal(packed.view("u2"), np.where(less, 0xFFFF, 0))


def test_f64() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(COUNT) * 10.0 ** rng.integers(-5, 5, COUNT) for _ in range(3))
    for code, want in {
        "add.f64 out, a, b;": a + b,
        "sub.f64 out, a, b;": a - b,
        "mul.f64 out, a, b;": a * b,
        "div.rn.f64 out, a, b;": a / b,
        "max.f64 out, a, b;": np.maximum(a, b),
        "abs.f64 out, a;": np.abs(a),
        "copysign.f64 out, a, b;": np.copysign(b, a),
    }.items():
        np.testing.assert_array_equal(evaluate(code, "f8", a, b), want, err_msg=code)
    exact = [
        float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(evaluate("fma.rn.f64 out, a, b, c;", "f8", a, b, c), exact)


def test_special_functions_are_exact_and_rounded() -> None:
    x = np.random.default_rng(0).uniform(0.01, 20, COUNT).astype("f4")
    wide = x.astype("f8")
    for code, want in {
        "ex2.approx.f32 out, a;": np.exp2(wide),
        "lg2.approx.f32 out, a;": np.log2(wide),
        "sin.approx.f32 out, a;": np.sin(wide),
        "cos.approx.f32 out, a;": np.cos(wide),
        "tanh.approx.f32 out, a;": np.tanh(wide),
        "rsqrt.approx.f32 out, a;": 1 / np.sqrt(wide),
        "rcp.approx.ftz.f32 out, a;": 1 / wide,
        "sqrt.approx.f32 out, a;": np.sqrt(wide),
    }.items():
        np.testing.assert_array_equal(evaluate(code, "f4", x), want.astype("f4"), err_msg=code)
    halves = np.random.default_rng(1).uniform(-4, 4, COUNT).astype("f2")
    want_half = np.tanh(halves.astype("f8")).astype("f2")
    np.testing.assert_array_equal(evaluate("tanh.approx.f16 out, a;", "f2", halves), want_half)


# ---- conversions


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_narrowing(mode: str, target: str) -> None:
    form = FORMATS[target]
    a = numbers(F32, 0)
    # Numbers half-way between two of the target, and next to half-way.
    drop = 23 - form.mantissa_bits
    half = 1 << (drop - 1)
    if target == "bf16":
        a[100:400] = a[100:400] >> drop << drop | half
        a[100:400:3] += 1
    else:
        a[100:400] = 0x3F800000 + (a[100:400] % 4096 << drop) | half
        a[200:300] -= 0x06000000  # subnormal halves

    def narrow(x: int) -> int | None:
        value = F32.decode(x)
        if value != value:
            return None
        if is_special(value):
            infinity = ((1 << form.exponent_bits) - 1) << form.mantissa_bits
            return infinity | (0x8000 if value < 0 else 0)
        return form.round(Fraction(value), mode, negative_zero=bool(x >> 31))

    check(f"cvt.{mode}.{target}.f32 out, a;", target, narrow, a)
    b = numbers(F32, 1)
    got = evaluate(f"cvt.{mode}.{target}x2.f32 out, a, b;", "u4", a, b)
    high = evaluate(f"cvt.{mode}.{target}.f32 out, a;", "u2", a).astype("u4")
    low = evaluate(f"cvt.{mode}.{target}.f32 out, a;", "u2", b)
    np.testing.assert_array_equal(got, high << 16 | low)


def test_every_half_widens() -> None:
    every = np.arange(1 << 16, dtype="u2")
    want = every.view("f2").astype("f4")
    got = evaluate("cvt.f32.f16 out, a;", "f4", every)
    np.testing.assert_array_equal(got, want)
    got = evaluate("cvt.f32.bf16 out, a;", "u4", every)
    np.testing.assert_array_equal(got, every.astype("u4") << 16)


@pytest.mark.parametrize("mode", ["rn", "rz", "rna"])
def test_tf32(mode: str) -> None:
    a = numbers(F32, 0)

    def narrow(x: int) -> int | None:
        value = F32.decode(x)
        if value != value:
            return None
        if is_special(value):
            return x
        return TF32.round(Fraction(value), mode, negative_zero=bool(x >> 31)) << 13

    check(f"cvt.{mode}.tf32.f32 out, a;", "f32", narrow, a)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("target", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
def test_floats_to_integers_saturate(mode: str, target: str, source: str) -> None:
    rng = np.random.default_rng(0)
    scale = 2.0 ** rng.integers(-3, 15 if source == "f16" else 70, COUNT)
    x = (rng.standard_normal(COUNT) * scale).astype(f"f{int(source[1:]) // 8}")
    x[:8] = [0.5, 1.5, -0.5, -1.5, np.inf, -np.inf, np.nan, 2.5]
    width = int(target[1:])
    low, high = (
        (-(1 << (width - 1)), (1 << (width - 1)) - 1) if target[0] == "s" else (0, (1 << width) - 1)
    )
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](
        x.astype("f8")
    )

    def integer(value: float) -> int:
        if value != value:
            return 0
        return (
            low
            if value == -np.inf
            else high
            if value == np.inf
            else max(low, min(high, int(value)))
        )

    out = f"{'i' if target[0] == 's' else 'u'}{max(width // 8, 2)}"
    got = evaluate(f"cvt.{mode}.{target}.{source} out, a;", out, x)
    np.testing.assert_array_equal(got, np.array([integer(float(v)) for v in rounded], out))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["u32", "s32", "u64", "s64"])
def test_integers_to_floats(mode: str, source: str) -> None:
    rng = np.random.default_rng(0)
    width = int(source[1:])
    shift = rng.integers(0, width - 1, COUNT)
    dtype = f"{'i' if source[0] == 's' else 'u'}{width // 8}"
    x = (
        (rng.integers(0, 1 << 63, COUNT, dtype="u8") >> shift.astype("u8"))
        .astype(f"u{width // 8}")
        .view(dtype)
    )
    x[:4] = np.array([0, 1, 0xFFFFFFFF, 0x1000001], "u8").astype(x.dtype)
    f64 = Format(11, 52)
    got = evaluate(f"cvt.{mode}.f32.{source} out, a;", "u4", x)
    np.testing.assert_array_equal(got, [F32.round(Fraction(int(v)), mode) for v in x])
    got = evaluate(f"cvt.{mode}.f64.{source} out, a;", "u8", x)
    np.testing.assert_array_equal(got, [f64.round(Fraction(int(v)), mode) for v in x])


def test_integers_to_integers() -> None:
    x = np.array([0, 1, -1, 127, 128, -128, -129, 255, 256, 32767, 32768, -(1 << 31)], "i4")
    x = np.tile(x, 32)[:256]
    got = evaluate("cvt.sat.s8.s32 out, a;", "i2", x)
    np.testing.assert_array_equal(got, np.clip(x, -128, 127))
    got = evaluate("cvt.sat.u8.s32 out, a;", "u2", x)
    np.testing.assert_array_equal(got, np.clip(x, 0, 255))
    np.testing.assert_array_equal(evaluate("cvt.s8.s32 out, a;", "i4", x), x.astype("i1"))
    np.testing.assert_array_equal(evaluate("cvt.u16.s32 out, a;", "u4", x), x.astype("u2"))
    np.testing.assert_array_equal(evaluate("cvt.s64.s32 out, a;", "i8", x), x)
    np.testing.assert_array_equal(evaluate("cvt.u64.u32 out, a;", "u8", x), x.view("u4"))


def test_floats_to_whole_floats() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, np.inf, -0.0], "f4")
    for mode, f in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        got = evaluate(f"cvt.{mode}.f32.f32 out, a;", "u4", x)
        np.testing.assert_array_equal(got, f(x).view("u4"))


def test_bytes_as_floats() -> None:
    every = np.arange(256, dtype="u2")
    pairs = every | every << 8
    got = evaluate("cvt.rn.f16x2.e5m2x2 out, a;", "u4", pairs).view("f2")[::2]
    with np.errstate(invalid="ignore"):
        want = (every << 8).astype("u2").view("f2")  # e5m2 is the high half of f16
    np.testing.assert_array_equal(got, want)
    got = evaluate("cvt.rn.f16x2.e4m3x2 out, a;", "u4", pairs).view("f2")[::2]
    exponent, mantissa = every >> 3 & 15, every & 7
    value = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    want = np.where(every & 0x7F == 0x7F, np.nan, np.where(every & 0x80, -value, value))
    np.testing.assert_array_equal(got, want.astype("f2"))
    numbers_only = np.setdiff1d(every, [0x7F, 0xFF]).astype("u2")[:128]
    floats = evaluate("cvt.rn.f16x2.e4m3x2 out, a;", "u4", numbers_only)
    back = evaluate("cvt.rn.satfinite.e4m3x2.f16x2 out, a;", "u2", floats)
    np.testing.assert_array_equal(back, numbers_only)
