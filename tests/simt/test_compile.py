"""CUDA and Triton kernels become PTX without a GPU, and complaints are clear."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import simt_kernels

from evsam_kernels import simt
from evsam_kernels.simt import toolchain

SCALE = """
#include "factor.h"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }
"""


def test_cuda_text_and_file_compile_alike(tmp_path: Path) -> None:
    text = 'extern "C" __global__ void store(int* x) { *x = 1; }\n'
    (tmp_path / "store.cu").write_text(text)
    from_text, from_file = simt.compile_cuda(text), simt.compile_cuda(tmp_path / "store.cu")
    assert from_text.sources == {"kernel.cu": text}
    assert from_file.sources == {"store.cu": text}
    for module in (from_text, from_file):
        assert module.target == "sm_80"
        assert [kernel.name for kernel in module.kernels] == ["store"]
        assert str(tmp_path) not in module.ptx and "/tmp/" not in module.ptx


def test_a_file_finds_its_headers_and_options_reach_nvcc(tmp_path: Path) -> None:
    (tmp_path / "factor.h").write_text("#ifndef FACTOR\n#define FACTOR 2\n#endif\n")
    (tmp_path / "scale.cu").write_text(SCALE)
    plain = simt.compile_cuda(tmp_path / "scale.cu")
    assert "0f40400000" not in plain.ptx
    defined = simt.compile_cuda(tmp_path / "scale.cu", 90, options=["-DFACTOR=3"])
    assert "0f40400000" in defined.ptx
    assert defined.target == "sm_90"


def test_what_nvcc_complains_of_is_passed_on() -> None:
    with pytest.raises(simt.ToolError, match=r"(?s)nvcc fails with status.*\"y\" is undefined"):
        simt.compile_cuda("__global__ void broken(int* x) { *x = y; }")


def test_without_nvcc_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_candidates", lambda tool: iter(()))
    with pytest.raises(simt.ToolNotFoundError, match=r"nvcc is not installed: .*pip install"):
        simt.compile_cuda("")


def test_nvidia_s_packages_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra `cuda` has all that nvcc needs for the headers that kernels include."""
    packages = [path for path in toolchain.find("nvcc") if "site-packages" in path.parts]
    if not packages:
        pytest.skip("evsam-kernels[cuda] is not installed")
    monkeypatch.setattr(toolchain, "_candidates", lambda tool: iter(packages))
    headers = ("cuda_fp16.h", "cuda_bf16.h", "cuda_pipeline.h", "mma.h", "cooperative_groups.h")
    source = "".join(f"#include <{header}>\n" for header in headers)
    module = simt.compile_cuda(source + 'extern "C" __global__ void nothing() {}')
    assert [kernel.name for kernel in module.kernels] == ["nothing"]


class TestTriton:
    @pytest.fixture(autouse=True)
    def _needs_triton(self) -> None:
        pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")

    def test_a_kernel_compiles_for_several_architectures(self) -> None:
        case = simt_kernels.TRITON["softmax-float32"]()
        for arch in (80, 86, 89, 90):
            module = case.compile(arch)
            assert module.target.startswith(f"sm_{arch}")
            assert module.name == "softmax"
            assert module.block == (128, 1, 1)
        assert "triton_kernels.py" in module.sources
        assert "/" not in "".join(line for line in module.ptx.splitlines() if ".file" in line)

    def test_warps_and_stages_are_those_asked_for(self) -> None:
        case = simt_kernels.TRITON["gemm-float16"]()
        shared = {}
        for stages in (2, 4):
            module = simt.compile_triton(
                case.kernel, case.signature, case.constants, num_warps=8, num_stages=stages
            )
            assert module.block == (256, 1, 1)
            shared[stages] = module.shared
        assert shared[4] > shared[2] > 0

    def test_a_promise_of_alignment_makes_wider_accesses(self) -> None:
        case = simt_kernels.TRITON["gemm-float16"]()
        sizes = dict.fromkeys(("rows", "columns", "depth"), "i32")
        unknown = simt.compile_triton(case.kernel, case.signature | sizes, case.constants)
        assert "cp.async" in case.compile().ptx
        assert "cp.async" not in unknown.ptx

    @pytest.mark.parametrize(
        ("signature", "constants", "message"),
        [
            ({"x": "*fp32"}, {"COLUMNS": 8}, r"columns, y neither in signature nor in constants"),
            ({"x": "*fp32", "y": "*fp32", "columns": "i32"}, {"COLUMNS": 8, "x": 0}, "x both in"),
            (
                {"x": "*fp32", "y": "*fp32", "columns": "i32", "rows": "i32"},
                {"COLUMNS": 8},
                "rows not among its arguments",
            ),
            (
                {"x": "*fp32", "y": "*fp32", "columns": "i32:8"},
                {"COLUMNS": 8},
                "hint of columns must be 16, as in 'i32:16', got 'i32:8'",
            ),
        ],
    )
    def test_arguments_that_do_not_fit_are_named(
        self, signature: dict[str, str], constants: dict[str, int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            simt.compile_triton(simt_kernels.triton_kernels().softmax, signature, constants)

    def test_what_is_no_kernel_is_named(self) -> None:
        with pytest.raises(TypeError, match=r"decorated with triton\.jit, got builtin_function"):
            simt.compile_triton(print, {}, {})

    def test_an_autotuned_kernel_is_compiled_with_the_constants_given(self) -> None:
        import triton

        case = simt_kernels.TRITON["softmax-float32"]()
        configs = [triton.Config({"COLUMNS": 1024})]
        tuned = triton.runtime.Autotuner(
            case.kernel,
            case.kernel.arg_names,
            configs,
            key=[],
            reset_to_zero=None,
            restore_value=None,
        )
        module = simt.compile_triton(tuned, case.signature, case.constants)
        assert module.ptx == case.compile().ptx


def test_without_triton_the_remedy_is_named() -> None:
    code = """
import sys
sys.modules["triton"] = None
from evsam_kernels import simt
try:
    simt.compile_triton(print, {}, {})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "compile_triton needs Triton: pip install triton\n"
