"""What KERNEL of `evsam inspect` may look like, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evsam_kernels import simt
from evsam_kernels.cli import launches

FILL = """
extern "C" __global__ void fill(float* x, float value, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = value;
}
__global__ void mangled(int* x) { *x = 1; }
"""

COPY = """
import triton
import triton.language as tl

@triton.jit
def copy(x, y, n, flag, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fill.cu").write_text(FILL)
    (tmp_path / "copies.py").write_text(COPY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_alone_is_not_launched() -> None:
    kernel = launches.parse("folder/fill.cu")
    assert (kernel.place, kernel.function, kernel.launch) == ("folder/fill.cu", "", None)
    kernel = launches.parse("fill.ptx:fill")
    assert (kernel.place, kernel.function, kernel.launch) == ("fill.ptx", "fill", None)


def test_a_cuda_launch_looks_like_cuda() -> None:
    kernel = launches.parse("fill.cu:fill<<<(2, 3), 128, 4 * 16>>>(f32[2, 100], value=2.5, n=100)")
    assert (kernel.place, kernel.function) == ("fill.cu", "fill")
    assert kernel.launch is not None
    assert kernel.launch.configuration == ((2, 3), 128, 64)
    assert kernel.launch.keywords == {"value": 2.5, "n": 100}
    (tensor,) = kernel.launch.args
    assert (tensor.shape, tensor.dtype) == ((2, 100), torch.float32)
    assert tensor.std() > 0.5


def test_a_triton_launch_looks_like_triton() -> None:
    kernel = launches.parse("package.copies:copy[(4,)](i32[8], empty(bf16[8]), 8, BLOCK=8)")
    assert (kernel.place, kernel.function) == ("package.copies", "copy")
    assert kernel.launch is not None
    assert kernel.launch.configuration == ((4,),)
    values, memory, n = kernel.launch.args
    assert values.dtype == torch.int32 and int(values.min()) >= 0
    assert isinstance(memory, simt.Buffer) and not memory.initialised
    assert memory.array.dtype == torch.bfloat16
    assert n == 8


def test_arguments_are_expressions() -> None:
    kernel = launches.parse("k.cu:k<<<1, 1>>>(zeros(f16[3]), i64[50] % 16, torch.arange(3), -1e-5)")
    assert kernel.launch is not None
    zeros, small, arange, eps = kernel.launch.args
    assert zeros.tolist() == [0, 0, 0] and zeros.dtype == torch.float16
    assert 0 <= int(small.min()) < int(small.max()) < 16
    assert arange.tolist() == [0, 1, 2]
    assert eps == -1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "KERNEL must be FILE.cu:NAME<<<GRID, BLOCK>>>"),
        ("k.cu:k<<<1, 32>>>", "KERNEL must be"),
        ("k.cu:k[1](2)", r"a kernel of k.cu is launched as NAME<<<GRID, BLOCK>>>"),
        ("k.py:k<<<1, 2>>>(2)", r"a kernel of k.py is launched as NAME\[GRID\]"),
        ("k.cu<<<1, 32>>>()", r"name the kernel to launch, k.cu:NAME"),
        ("k.cu:k<<<1, 32>>>(g32[3])", "name 'g32' is not defined; arguments are numbers and"),
        ("k.cu:k<<<1, 32>>>(1 +)", "cannot be evaluated: invalid syntax"),
        ("k.cu:k<<<1, 32>>>(__import__('os'))", "name '__import__' is not defined"),
    ],
)
def test_what_cannot_be_understood_is_explained(text: str, message: str) -> None:
    with pytest.raises(launches.KernelArgumentError, match=message):
        launches.parse(text)


def test_a_cuda_kernel_is_found_and_its_arguments_named(folder: Path) -> None:
    text = "fill.cu:fill<<<2, 64>>>(target=empty(f32[100]), value=2.0, n=100)"
    prepared = launches.prepare(launches.parse(text), 80)
    assert prepared.function == "fill"
    assert prepared.launch is not None
    grid, block, shared, (target, value, n) = prepared.launch
    assert (grid, block, shared, value, n) == (2, 64, 0, 2.0, 100)
    assert (target.name, target.initialised) == ("target", False)


def test_a_kernel_is_found_by_the_name_in_its_source(folder: Path) -> None:
    prepared = launches.prepare(launches.parse("fill.cu:mangled"), 80)
    assert prepared.function == "_Z7mangledPi"


def test_a_triton_kernel_is_compiled_for_its_arguments(folder: Path) -> None:
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    text = "copies.py:copy[2](f16[64], empty(f16[64]), 64, flag=1, BLOCK=32, num_warps=1)"
    prepared = launches.prepare(launches.parse(text), 80)
    assert isinstance(prepared.module, simt.TritonModule)
    assert prepared.launch is not None
    grid, block, shared, args = prepared.launch
    assert (grid, block, shared) == (2, (32, 1, 1), 0)
    # A flag of 1 is compiled in, as Triton's own launcher does it.
    x, y, n = args
    assert (x.name, y.name, n) == ("x", "y", 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.cu:k<<<1, 1>>>()", "there is no file none.cu"),
        ("fill.cu:pour<<<1, 1>>>()", "pour is not there; there is .*fill"),
        ("fill.cu:fill<<<1>>>()", "grid, block and perhaps bytes of dynamic shared memory, got 1"),
        ("copies.py:copy", "what a Triton kernel compiles to depends on its arguments"),
        ("copies.py:paste[1]()", "copies.py has no paste"),
        ("absent.py:copy[1]()", "No such file or directory"),
        ("no_such_module:copy[1]()", "No module named 'no_such_module'"),
        ("copies.py:copy[1](f32[1], f32[1], 1)", "BLOCK, flag neither in signature nor in"),
        ("copies.py:copy[1](1, 2, 3, 4, 5, 6)", "copy takes x, y, n, flag, BLOCK, got 6"),
    ],
)
def test_what_cannot_be_found_is_explained(text: str, message: str, folder: Path) -> None:
    if "copies.py" in text:
        pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    with pytest.raises(launches.KernelArgumentError, match=message):
        launches.prepare(launches.parse(text), 80)
