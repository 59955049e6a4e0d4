"""Whole kernels in CUDA and Triton: right against float64, and without a fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import simt_kernels

pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")


@pytest.mark.parametrize("name", simt_kernels.CUDA)
def test_cuda_kernels_are_right_and_clean(name: str) -> None:
    case = simt_kernels.CUDA[name]()
    report = case.launch(simt_kernels.cuda_module(name))
    assert report.faults == ()
    assert case.expected.abs().max() > 0
    assert case.error <= case.tolerance


@pytest.mark.parametrize("name", simt_kernels.TRITON)
def test_triton_kernels_are_right_and_clean(name: str) -> None:
    case = simt_kernels.TRITON[name]()
    report = case.case.launch(case.compile())
    assert report.faults == ()
    assert case.case.expected.abs().max() > 0
    assert case.case.error <= case.case.tolerance


@pytest.mark.parametrize("name", simt_kernels.CUDA)
def test_the_result_is_the_same_unchecked_and_on_more_threads(name: str) -> None:
    results = []
    for options in ({}, {"threads": 2}, {"check": False}, {"check": False, "threads": 2}):
        case = simt_kernels.CUDA[name]()
        report = case.launch(simt_kernels.cuda_module(name), **options)
        results.append((case.output, report.faults, report.counters["lane_executions"].tolist()))
    for output, faults, executions in results[1:]:
        assert torch.equal(output, results[0][0])
        assert faults == ()
        assert executions == results[0][2]


def test_matrix_products_are_counted_by_shape_and_line() -> None:
    case = simt_kernels.gemm(rows=64, columns=128, depth=96)
    report = case.launch(simt_kernels.cuda_module("gemm"))
    assert report.mma == {"m16n8k16 f32.f16.f16.f32": 64 * 128 * 96 // (16 * 8 * 16)}
    (line,) = (line for line in report.by_line if line.mma)
    assert line.mma == report.mma
    assert line.by_kind["mma"]["warp_executions"] == report.mma["m16n8k16 f32.f16.f16.f32"]
    assert "mma m16n8k16 f32.f16.f16.f32: 384" in str(report)


AGREED = [name for name in simt_kernels.TRITON if "bfloat16" not in name]
"""Where the interpreter is right: it computes bfloat16 on raw bits."""

INTERPRET = """
import sys
import torch
from support import simt_kernels

results = {}
for name in sys.argv[2:]:
    case = simt_kernels.TRITON[name]()
    args = [getattr(arg, "array", arg) for arg in case.case.args]
    case.kernel[case.case.grid](*args, **case.constants)
    results[name] = case.case.output
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What Triton's interpreter computes; it has to be chosen before Triton is imported."""
    path = tmp_path_factory.mktemp("interpreter") / "results.pt"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", INTERPRET, path, *AGREED], env=environment, check=True)
    results: dict[str, torch.Tensor] = torch.load(path)
    return results


@pytest.mark.parametrize("name", AGREED)
def test_triton_kernels_agree_with_triton_s_interpreter(
    name: str, interpreted: dict[str, torch.Tensor]
) -> None:
    case = simt_kernels.TRITON[name]()
    case.case.launch(case.compile())
    apart = float((case.case.output.double() - interpreted[name].double()).abs().max())
    assert apart <= case.case.tolerance * float(case.case.expected.abs().max())
