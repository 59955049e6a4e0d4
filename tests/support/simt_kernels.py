"""Kernels with inputs and float64 results, for all tests of the executor that run whole kernels."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from evsam_kernels import simt

FOLDER = Path(__file__).parents[1] / "simt" / "kernels"


@dataclass(frozen=True)
class Case:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        grid, block, shared, args: how it is launched; Triton's block and shared memory are its own.
        output: the argument that it writes, or adds to.
        expected: what that must be then, float64.
        tolerance: relative to the largest result; a few roundings of the kernel's dtype.
    """

    kernel: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    output: torch.Tensor
    expected: torch.Tensor
    tolerance: float
    block: tuple[int, ...] = (128,)
    shared: int = 0

    def launch(self, module: simt.Module, **options: Any) -> simt.Report:
        if isinstance(module, simt.TritonModule):
            block, shared = module.block, module.shared
        else:
            block, shared = self.block, self.shared
        return module.launch(self.kernel, self.grid, block, shared, list(self.args), **options)

    @property
    def error(self) -> float:
        """The largest error over the largest result; infinite where there is NaN."""
        error = (self.output.double() - self.expected).abs().nan_to_num(nan=torch.inf)
        return float(error.max() / self.expected.abs().max())


def cuda_source(kernel: str) -> str:
    return (FOLDER / f"{kernel}.cu").read_text(encoding="utf-8")


@functools.cache
def cuda_module(kernel: str) -> simt.Module:
    return simt.compile_cuda(FOLDER / f"{kernel}.cu")


@functools.cache
def triton_kernels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_kernels", FOLDER / "triton_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, simt.Buffer]:
    """A result's memory, full of NaN, and the argument that says that nothing has written it."""
    tensor = torch.full(shape, torch.nan, dtype=dtype)
    return tensor, simt.Buffer(tensor, name="output", initialised=False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(
        x.double(), x.shape[-1:], weight.double(), bias.double(), 1e-5
    )


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())


def gemm(rows: int = 100, columns: int = 72, depth: int = 96) -> Case:
    a, b = normal(rows, depth).half(), normal(columns, depth, seed=1).half()
    output, argument = unwritten(rows, columns, dtype=torch.float16)
    return Case(
        "gemm",
        (-(-columns // 64), -(-rows // 64)),
        (a, b, argument, rows, columns, depth),
        output,
        a.double() @ b.double().T,
        1e-3,
        shared=3 * 2 * 64 * 32 * 2,
    )


def softmax(rows: int = 3, columns: int = 300) -> Case:
    x = normal(rows, columns)
    output, argument = unwritten(rows, columns)
    return Case("softmax", (rows,), (x, argument, columns), output, x.double().softmax(-1), 1e-6)


def layer_norm(rows: int = 7, columns: int = 100) -> Case:
    x = normal(rows, columns).bfloat16()
    weight, bias = normal(columns, seed=1), normal(columns, seed=2)
    output, argument = unwritten(rows, columns, dtype=torch.bfloat16)
    args = (x, weight, bias, argument, rows, columns, 1e-5)
    expected = _layer_norm(x, weight, bias)
    return Case("layer_norm", (-(-rows // 4),), args, output, expected, 4e-3)


def reduction(n: int = 5000) -> Case:
    x, total = normal(n), torch.zeros(1)
    expected = x.double().sum().reshape(1)
    return Case("reduction", (4,), (x, total, n), total, expected, 1e-5, block=(256,))


def stencil(height: int = 37, width: int = 50) -> Case:
    x = normal(height, width)
    output, argument = unwritten(height, width)
    expected = torch.nn.functional.avg_pool2d(x.double()[None], 3, 1, 1)[0]
    grid = (-(-width // 16), -(-height // 16))
    args = (x, argument, height, width)
    return Case("stencil", grid, args, output, expected, 1e-6, block=(16, 16))


def histogram(n: int = 3000) -> Case:
    values = torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(0)).int()
    counts = torch.zeros(64, dtype=torch.int32)
    expected = torch.bincount(values, minlength=64).double()
    return Case("histogram", (4,), (values, counts, n), counts, expected, 0)


def split_k(rows: int = 5, depth: int = 1000, splits: int = 4) -> Case:
    a, x = normal(rows, depth), normal(depth, seed=1)
    parts = simt.Buffer(torch.full((rows, splits), torch.nan), name="parts", initialised=False)
    arrived = torch.zeros(rows, dtype=torch.int32)
    output, argument = unwritten(rows)
    args = (a, x, parts, arrived, argument, depth)
    expected = a.double() @ x.double()
    return Case("split_k", (splits, rows), args, output, expected, 1e-5, block=(64,))


def attention(heads: int = 2, tokens: int = 75) -> Case:
    q, k, v = (normal(heads, tokens, 32, seed=seed) for seed in range(3))
    output, argument = unwritten(heads, tokens, 32)
    grid, args = (-(-tokens // 64), heads), (q, k, v, argument, tokens)
    return Case("attention", grid, args, output, _attention(q, k, v), 1e-5, block=(64,))


CUDA: dict[str, Callable[[], Case]] = {
    case.__name__: case
    for case in (
        *(gemm, softmax, layer_norm, reduction),
        *(stencil, histogram, split_k, attention),
    )
}


@dataclass(frozen=True)
class TritonCase:
    """A Triton kernel's launch, and how it is compiled."""

    case: Case
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def kernel(self) -> Any:
        return getattr(triton_kernels(), self.case.kernel)

    def compile(self, arch: int = 80) -> simt.TritonModule:
        return simt.compile_triton(
            self.kernel, self.signature, self.constants, arch, self.num_warps, self.num_stages
        )


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
_ROUNDINGS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""A few roundings of a result, and of what the kernels round to the dtype on the way."""


def triton_gemm(dtype: torch.dtype, precision: str = "ieee") -> TritonCase:
    rows, columns, depth = 70, 80, 112
    a, b = normal(rows, depth).to(dtype), normal(depth, columns, seed=1).to(dtype)
    output, argument = unwritten(rows, columns, dtype=dtype)
    # tf32 has the mantissa of float16.
    tolerance = 2e-3 if precision == "tf32" else _ROUNDINGS[dtype]
    args = (a, b, argument, rows, columns, depth)
    case = Case("gemm", (3, 3), args, output, a.double() @ b.double(), tolerance)
    types = dict.fromkeys(("a", "b", "c"), _POINTERS[dtype])
    # Without the promise of aligned rows Triton does not use asynchronous copies.
    types |= {"rows": "i32", "columns": "i32:16", "depth": "i32:16"}
    tile = {"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "PRECISION": precision}
    return TritonCase(case, types, tile, num_stages=3)


def triton_softmax(dtype: torch.dtype) -> TritonCase:
    x = normal(3, 200).to(dtype)
    output, argument = unwritten(3, 200, dtype=dtype)
    expected = x.double().softmax(-1)
    case = Case("softmax", (3,), (x, argument, 200), output, expected, _ROUNDINGS[dtype])
    pointer = _POINTERS[dtype]
    return TritonCase(case, {"x": pointer, "y": pointer, "columns": "i32"}, {"COLUMNS": 256})


def triton_layer_norm(dtype: torch.dtype) -> TritonCase:
    x, weight, bias = normal(5, 100).to(dtype), normal(100, seed=1), normal(100, seed=2)
    output, argument = unwritten(5, 100, dtype=dtype)
    args = (x, weight, bias, argument, 100, 1e-5)
    case = Case("layer_norm", (5,), args, output, _layer_norm(x, weight, bias), _ROUNDINGS[dtype])
    types = dict.fromkeys(("x", "y"), _POINTERS[dtype])
    types |= {"weight": "*fp32", "bias": "*fp32", "columns": "i32", "eps": "fp32"}
    return TritonCase(case, types, {"COLUMNS": 128}, num_warps=2)


def triton_attention(dtype: torch.dtype) -> TritonCase:
    tokens = 50
    q, k, v = (normal(2, tokens, 32, seed=seed).to(dtype) for seed in range(3))
    output, argument = unwritten(2, tokens, 32, dtype=dtype)
    # Triton multiplies float32 as tf32 by default.
    tolerance = 2e-3 if dtype == torch.float32 else _ROUNDINGS[dtype]
    args = (q, k, v, argument, tokens, 32**-0.5)
    case = Case("attention", (2, 2), args, output, _attention(q, k, v), tolerance)
    types = dict.fromkeys(("q", "k", "v", "out"), _POINTERS[dtype])
    return TritonCase(case, types | {"tokens": "i32", "scale": "fp32"}, {"WIDTH": 32, "TILE": 32})


def triton_histogram() -> TritonCase:
    values = torch.randint(0, 16, (500,), generator=torch.Generator().manual_seed(0)).int()
    counts = torch.zeros(16, dtype=torch.int32)
    expected = torch.bincount(values, minlength=16).double()
    case = Case("histogram", (4,), (values, counts, 500), counts, expected, 0)
    return TritonCase(case, {"values": "*i32", "counts": "*i32", "n": "i32"}, {"BLOCK": 128})


def triton_total() -> TritonCase:
    x = normal(1000)
    output, argument = unwritten(2)
    expected = x.double().split(512)
    sums = torch.stack([part.sum() for part in expected])
    case = Case("total", (2,), (x, argument, 1000), output, sums, 1e-5)
    return TritonCase(case, {"x": "*fp32", "parts": "*fp32", "n": "i32"}, {"BLOCK": 512})


def _by_dtype(
    make: Callable[[torch.dtype], TritonCase],
) -> dict[str, Callable[[], TritonCase]]:
    return {
        f"{make.__name__[len('triton_') :]}-{str(dtype)[len('torch.') :]}": functools.partial(
            make, dtype
        )
        for dtype in _POINTERS
    }


TRITON: dict[str, Callable[[], TritonCase]] = {
    **_by_dtype(triton_gemm),
    "gemm-tf32": functools.partial(triton_gemm, torch.float32, "tf32"),
    **_by_dtype(triton_softmax),
    **_by_dtype(triton_layer_norm),
    **_by_dtype(triton_attention),
    "histogram": triton_histogram,
    "total": triton_total,
}
