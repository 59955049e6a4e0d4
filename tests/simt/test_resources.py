"""Registers, spills, shared memory and opcodes are those of the machine code."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import simt_kernels

from evsam_kernels import simt
from evsam_kernels.simt import toolchain

SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
    float kept[96];
    for (int i = 0; i < 96; i++) kept[i] = x[threadIdx.x + 1024 * i];
    __syncthreads();
    for (int i = 0; i < 96; i++) y[threadIdx.x + 1024 * i] = kept[i] * kept[95 - i];
}
extern "C" __global__ void indexed(int* x, int i, int n) {
    int local[32];
    for (int j = 0; j < n; j++) local[x[j] % 32] += j;
    x[0] = local[i];
}
extern "C" __global__ void shares(int* x) {
    __shared__ int own[256];
    own[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = own[threadIdx.x ^ 1];
}
"""


@pytest.fixture(scope="module")
def module() -> simt.Module:
    return simt.compile_cuda(SPILLS)


def test_what_ptxas_says_of_every_kernel(module: simt.Module) -> None:
    found = simt.resources(module)
    assert set(found) == {"spills", "indexed", "shares"}
    assert found["spills"].registers == 32
    assert found["spills"].spill_loads == found["spills"].spill_stores == found["spills"].stack > 0
    # An array that is indexed lives in local memory, and is no spill.
    assert (found["indexed"].stack, found["indexed"].spill_stores) == (128, 0)
    assert (found["shares"].shared, found["shares"].barriers) == (1024, 1)
    assert (found["indexed"].shared, found["indexed"].barriers) == (0, 0)


def test_opcodes_are_counted_by_kernel(module: simt.Module) -> None:
    found = simt.resources(module)
    assert {"LDS", "STS", "BAR", "LDG", "STG", "EXIT"} <= set(found["shares"].opcodes)
    assert found["spills"].opcodes["LDG"] == 96
    assert found["spills"].opcodes["STL"] > 0
    assert "NOP" not in found["shares"].opcodes
    assert found["shares"].instructions == sum(found["shares"].opcodes.values()) > 5


def test_a_cubin_says_the_same_but_for_its_spills(module: simt.Module, tmp_path: Path) -> None:
    cubin, _ = simt.assemble(module)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    of_module = simt.resources(module)
    for code in (cubin, path):
        for name, found in simt.resources(code).items():
            assert found.spill_stores is found.spill_loads is found.barriers is None
            for field in ("registers", "stack", "shared", "opcodes"):
                assert getattr(found, field) == getattr(of_module[name], field), field


def test_a_listing_with_lines_says_the_same(module: simt.Module, tmp_path: Path) -> None:
    cubin, log = simt.assemble(module)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    listing = toolchain.run("nvdisasm", ["-c", "-g", path])
    assert simt.resources(cubin, log=log, listing=listing) == simt.resources(module)


def test_a_module_is_assembled_for_another_architecture(module: simt.Module) -> None:
    newer = simt.resources(module, 90)
    assert newer["shares"].opcodes != simt.resources(module)["shares"].opcodes


def test_tensor_cores_are_seen_in_cuda_and_triton() -> None:
    cuda = simt.resources(simt_kernels.cuda_module("gemm"))["gemm"]
    assert {"HMMA", "LDSM", "LDGSTS"} <= set(cuda.opcodes)
    assert cuda.spill_stores == 0
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    triton = simt.resources(simt_kernels.TRITON["gemm-float16"]().compile())["gemm"]
    assert "HMMA" in triton.opcodes
    assert triton.shared == 0  # Its shared memory is dynamic.


def test_ptx_that_is_none_is_refused() -> None:
    with pytest.raises(simt.ToolError, match="cuobjdump"):
        simt.resources(b"no cubin")


def test_the_line_information_of_the_ptx_changes_no_code(module: simt.Module) -> None:
    with_source, _ = simt.assemble(module)
    with_ptx, _ = simt.assemble(module, ptx_lines=True)
    assert with_source != with_ptx
    assert simt.resources(with_source) == simt.resources(with_ptx)
