"""Tensor-core instructions, with their fragments laid out by the atoms of CuTe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensor_layouts import atoms_nv, size

from evsam_kernels import simt
from tests.support.ptx import entry

LANES = 32


def fragment_map(layout: Any, rows: int) -> np.ndarray[Any, Any]:
    """Row and column of each value of each lane, `[32, values, 2]`."""
    values = size(layout) // LANES
    flat = np.array([[layout(t, v) for v in range(values)] for t in range(LANES)])
    assert sorted(flat.ravel()) == list(range(size(layout)))
    return np.stack([flat % rows, flat // rows], axis=-1)


def scatter(matrix: np.ndarray[Any, Any], layout: Any) -> np.ndarray[Any, Any]:
    """The fragments of a matrix `[rows, columns]`, values of each lane in a row."""
    where = fragment_map(layout, matrix.shape[0])
    return np.ascontiguousarray(matrix[where[..., 0], where[..., 1]])


def pack(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Registers of 32 bits, the first value lowest; values are their bits."""
    per = 32 // bits
    grouped = values.astype("u8").reshape(LANES, -1, per)
    shifts = np.arange(per, dtype="u8") * np.uint64(bits)
    return np.ascontiguousarray((grouped << shifts).sum(-1).astype("u4"))


def run(mnemonic: str, a: Any, b: Any, c: Any, register: str = "b32") -> Any:
    """Runs an mma on registers `[32, n]` of each operand."""
    width = a.itemsize
    operands = {"d": c, "a": a, "b": b, "c": c}
    lines = ["mov.u32 %r0, %tid.x;"]
    names: dict[str, str] = {}
    for name, values in operands.items():
        n = values.shape[1]
        size_of = values.itemsize
        kind = register if size_of == width else "b32"
        lines.append(f".reg .{kind} {name}<{n}>; .reg .b64 at_{name};")
        lines.append(f"ld.param.u64 at_{name}, [p{name}];")
        lines.append(f"mad.wide.u32 at_{name}, %r0, {n * size_of}, at_{name};")
        names[name] = ", ".join(f"{name}{i}" for i in range(n))
        if name != "d":
            lines += [f"ld.global.{kind} {name}{i}, [at_{name}+{i * size_of}];" for i in range(n)]
    lists = ", ".join(f"{{{names[name]}}}" for name in "dabc")
    lines.append(f"mma.sync.aligned.{mnemonic} {lists};")
    n = c.shape[1]
    lines += [f"st.global.{register} [at_d+{i * c.itemsize}], d{i};" for i in range(n)]
    parameters = ", ".join(f".param .u64 p{name}" for name in "dabc")
    module = simt.Module(entry("\n    ".join(lines), parameters))
    out = np.zeros_like(c)
    module.launch("kernel", 1, LANES, 0, [out, a, b, c]).raise_for_faults()
    return out


FLOATS = [
    ("SM80_16x8x8_F32F16F16F32_TN", "m16n8k8.row.col.f32.f16.f16.f32", torch.float16, 8),
    ("SM80_16x8x16_F32F16F16F32_TN", "m16n8k16.row.col.f32.f16.f16.f32", torch.float16, 16),
    ("SM80_16x8x8_F32BF16BF16F32_TN", "m16n8k8.row.col.f32.bf16.bf16.f32", torch.bfloat16, 8),
    ("SM80_16x8x16_F32BF16BF16F32_TN", "m16n8k16.row.col.f32.bf16.bf16.f32", torch.bfloat16, 16),
    ("SM80_16x8x4_F32TF32TF32F32_TN", "m16n8k4.row.col.f32.tf32.tf32.f32", torch.float32, 4),
    ("SM80_16x8x8_F32TF32TF32F32_TN", "m16n8k8.row.col.f32.tf32.tf32.f32", torch.float32, 8),
    ("SM80_16x8x8_F16F16F16F16_TN", "m16n8k8.row.col.f16.f16.f16.f16", torch.float16, 8),
    ("SM80_16x8x16_F16F16F16F16_TN", "m16n8k16.row.col.f16.f16.f16.f16", torch.float16, 16),
]


def raw(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bits of a tensor's elements, unsigned."""
    width = tensor.element_size()
    view = tensor.contiguous().view({2: torch.int16, 4: torch.int32}[width])
    return view.numpy().view(f"u{width}")


@pytest.mark.parametrize(("atom", "mnemonic", "dtype", "k"), FLOATS, ids=[f[1] for f in FLOATS])
def test_float_products(atom: str, mnemonic: str, dtype: torch.dtype, k: int) -> None:
    layouts = getattr(atoms_nv, atom)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, k, generator=generator).to(dtype)
    b = torch.randn(8, k, generator=generator).to(dtype)
    half_sums = mnemonic.endswith("f16")
    c = torch.randn(16, 8, generator=generator).to(torch.float16 if half_sums else torch.float32)
    if dtype == torch.float32:  # tf32: what is below its mantissa does not count
        kept = torch.tensor(-(1 << 13), dtype=torch.int32)
        exact_a, exact_b = (
            (t.view(torch.int32) & kept).view(torch.float32).double() for t in (a, b)
        )
    else:
        exact_a, exact_b = a.double(), b.double()
    want = (c.double() + exact_a @ exact_b.T).to(c.dtype)
    bits = 8 * a.element_size()
    got = run(
        mnemonic,
        pack(scatter(raw(a), layouts.a_layout), bits),
        pack(scatter(raw(b), layouts.b_layout), bits),
        pack(scatter(raw(c), layouts.c_layout), 8 * c.element_size()),
    )
    expected = pack(scatter(raw(want), layouts.c_layout), 8 * c.element_size())
    np.testing.assert_array_equal(got, expected)


INTEGERS = [
    ("SM80_8x8x16_S32S8S8S32_TN", "m8n8k16", 8, 16),
    ("SM80_16x8x16_S32S8S8S32_TN", "m16n8k16", 8, 16),
    ("SM80_16x8x32_S32S8S8S32_TN", "m16n8k32", 8, 32),
    ("SM80_8x8x32_S32S4S4S32_TN", "m8n8k32", 4, 32),
    ("SM80_16x8x32_S32S4S4S32_TN", "m16n8k32", 4, 32),
    ("SM80_16x8x64_S32S4S4S32_TN", "m16n8k64", 4, 64),
]


@pytest.mark.parametrize(("atom", "shape", "bits", "k"), INTEGERS)
@pytest.mark.parametrize(("a_sign", "b_sign"), ["ss", "su", "us", "uu"])
@pytest.mark.parametrize("clamp", [False, True])
def test_integer_products(
    atom: str, shape: str, bits: int, k: int, a_sign: str, b_sign: str, clamp: bool
) -> None:
    layouts = getattr(atoms_nv, atom)
    rows = int(shape[1 : shape.index("n")])
    b_layout = layouts.b_layout
    if atom == "SM80_16x8x32_S32S4S4S32_TN":
        # CuTe's own names some elements twice and others never; b is that of m8n8k32.
        b_layout = atoms_nv.SM80_8x8x32_S32S4S4S32_TN.b_layout
    rng = np.random.default_rng(0)

    def random(sign: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        low = -(1 << (bits - 1)) if sign == "s" else 0
        return rng.integers(low, low + (1 << bits), shape)

    a, b = random(a_sign, (rows, k)), random(b_sign, (8, k))
    c = rng.integers(-(1 << 31), 1 << 31, (rows, 8))
    c[::2] = (1 << 31) - 1 - rng.integers(0, 99, c[::2].shape)
    total = c + a @ b.T
    want = np.clip(total, -(1 << 31), (1 << 31) - 1) if clamp else total
    suffix = ".satfinite" if clamp else ""
    got = run(
        f"{shape}.row.col{suffix}.s32.{a_sign}{bits}.{b_sign}{bits}.s32",
        pack(scatter(a % (1 << bits), layouts.a_layout), bits),
        pack(scatter(b % (1 << bits), b_layout), bits),
        scatter(c.astype("i4"), layouts.c_layout),
    )
    np.testing.assert_array_equal(got, scatter(want.astype("i4"), layouts.c_layout))


@pytest.mark.parametrize("shape", ["m8n8k128", "m16n8k128", "m16n8k256"])
@pytest.mark.parametrize("operation", ["xor", "and"])
def test_bit_products(shape: str, operation: str) -> None:
    rows, k = int(shape[1 : shape.index("n")]), int(shape[shape.index("k") + 1 :])
    layouts = getattr(atoms_nv, f"SM80_{rows}x8x{k}_S32U1U1S32_TN_XORPOPC")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (rows, k)), rng.integers(0, 2, (8, k))
    c = rng.integers(-99, 99, (rows, 8))
    met = a[:, None] ^ b[None] if operation == "xor" else a[:, None] & b[None]
    got = run(
        f"{shape}.row.col.s32.b1.b1.s32.{operation}.popc",
        pack(scatter(a, layouts.a_layout), 1),
        pack(scatter(b, layouts.b_layout), 1),
        scatter(c.astype("i4"), layouts.c_layout),
    )
    np.testing.assert_array_equal(got, scatter((c + met.sum(-1)).astype("i4"), layouts.c_layout))


def test_double_products() -> None:
    layouts = atoms_nv.SM80_8x8x4_F64F64F64F64_TN
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(-9, 9, (8, 4)) / 4, rng.integers(-9, 9, (8, 4)) / 4, rng.random((8, 8))
    got = run(
        "m8n8k4.row.col.f64.f64.f64.f64",
        scatter(a, layouts.a_layout),
        scatter(b, layouts.b_layout),
        scatter(c, layouts.c_layout),
        register="f64",
    )
    np.testing.assert_allclose(got, scatter(c + a @ b.T, layouts.c_layout), rtol=1e-15)


def test_sums_of_halves_are_rounded_once() -> None:
    """Small products that each vanish next to c count together."""
    layouts = atoms_nv.SM80_16x8x16_F32F16F16F32_TN
    a, b = np.full((16, 16), 2.0**-12, "f2"), np.full((8, 16), 2.0**-12, "f2")
    c = np.ones((16, 8), "f4")
    got = run(
        "m16n8k16.row.col.f32.f16.f16.f32",
        pack(scatter(a.view("u2"), layouts.a_layout), 16),
        pack(scatter(b.view("u2"), layouts.b_layout), 16),
        scatter(c.view("u4"), layouts.c_layout),
    )
    np.testing.assert_array_equal(got.view("f4"), np.float32(1 + 16 * 2.0**-24))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_move(count: int, transposed: bool) -> None:
    """ldmatrix gives lane l elements (l / 4, l % 4 * 2 ...) of 8 x 8; stmatrix puts them back."""
    suffix = f"x{count}{'.trans' if transposed else ''}.shared.b16"
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    stores = "\n".join(f"st.global.b32 [%q2+{128 * i}], %r{10 + i};" for i in range(count))
    body = f"""
    .shared .align 16 .b8 tile[512];
    .shared .align 16 .b8 back[512];
    mov.u32 %r0, %tid.x;
    ld.param.u64 %q0, [data];
    mad.wide.u32 %q1, %r0, 16, %q0;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%q1];
    shl.b32 %r5, %r0, 4;
    mov.u32 %r6, tile;
    add.u32 %r6, %r6, %r5;
    mov.u32 %r7, back;
    add.u32 %r7, %r7, %r5;
    st.shared.v4.b32 [%r6], {{%r1, %r2, %r3, %r4}};
    bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.{suffix} {{{registers}}}, [%r6];
    ld.param.u64 %q2, [fragments];
    mad.wide.u32 %q2, %r0, 4, %q2;
    {stores}
    stmatrix.sync.aligned.m8n8.{suffix} [%r7], {{{registers}}};
    bar.warp.sync 0xffffffff;
    setp.ge.u32 %p1, %r0, {8 * count};
    @%p1 bra done;
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r7];
    ld.param.u64 %q3, [copy];
    mad.wide.u32 %q3, %r0, 16, %q3;
    st.global.v4.b32 [%q3], {{%r1, %r2, %r3, %r4}};
    done:
    """
    data = np.arange(4 * 64, dtype="u2").reshape(4, 8, 8)
    fragments, copy = np.zeros((count, 32, 2), "u2"), np.zeros((count, 8, 8), "u2")
    module = simt.Module(entry(body, ".param .u64 data, .param .u64 fragments, .param .u64 copy"))
    report = module.launch("kernel", 1, 32, 0, [data, fragments, copy])
    report.raise_for_faults()
    matrices = data[:count].transpose(0, 2, 1) if transposed else data[:count]
    np.testing.assert_array_equal(fragments, matrices.reshape(count, 32, 2))
    np.testing.assert_array_equal(copy, data[:count])
