"""The CUDA kernel of `multi_scale_attention`, run in the executor."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import evsam_kernels as ek
from evsam_kernels import simt
from evsam_kernels.numerics.cases import CASES, Case
from evsam_kernels.numerics.tf32 import tf32
from evsam_kernels.numerics.validation import Step, validate
from evsam_kernels.ops.relu_linear_attention.reference import relu_linear_attention
from evsam_kernels.simt import emulation as emulator

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("evsam_kernels._simt", reason="the executor was not built")

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
OP = "multi_scale_attention"

# float16 has the least range and goes through every case, the others through the quick ones.
STEPS = [
    Step(case, dtype, ("cuda",))
    for case in CASES[OP]
    for dtype in ("float16", "bfloat16", "float32")
    if dtype == "float16" or case.quick
]


@pytest.fixture
def launcher():
    """The module that launches the kernel, imported where Triton is known to be there."""
    return importlib.import_module("evsam_kernels.ops.multi_scale_attention.cuda")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.case.name}-{step.dtype}")
def test_case(step):
    with tf32(False), simt.emulate() as emulation:
        (rows,) = validate([step])
    failed = [str(row) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)
    assert any(launch.report.kernel.startswith(OP) for launch in emulation.launches)


def attend(launcher, qkv: Tensor, dim: int, kernel: int) -> tuple[Tensor, list[simt.Report]]:
    """The attention at two scales of a map, and the reports of its launches."""
    draw = torch.Generator().manual_seed(1)
    channels = qkv.shape[1]
    filters = torch.randn(1, channels // dim, kernel**2, dim, generator=draw) / kernel
    groups = torch.randn(1, channels, dim, 1, 1, generator=draw) / dim**0.5
    out = torch.empty(len(qkv), channels // 3 * 2, *qkv.shape[2:], dtype=qkv.dtype)
    out = out.to(memory_format=torch.channels_last)
    operands = (filters.to(qkv.dtype), None, groups.to(qkv.dtype), None)
    with simt.emulate() as emulation:
        launcher._attend(qkv, *operands, out, None, None, kernel, dim, 1e-15)
    return out, [launch.report for launch in emulation.launches]


def attend_reference(qkv: Tensor, dim: int, kernel: int) -> Tensor:
    """What `attend` computes, in float64 of the same rounded operands."""
    draw = torch.Generator().manual_seed(1)
    channels = qkv.shape[1]
    filters = torch.randn(1, channels // dim, kernel**2, dim, generator=draw) / kernel
    groups = torch.randn(1, channels, dim, 1, 1, generator=draw) / dim**0.5
    taps = filters.to(qkv.dtype)[0].transpose(1, 2).reshape(channels, 1, kernel, kernel).double()
    filtered = torch.nn.functional.conv2d(qkv.double(), taps, padding=kernel // 2, groups=channels)
    aggregated = torch.nn.functional.conv2d(
        filtered, groups.to(qkv.dtype)[0].double(), groups=channels // dim
    )
    return relu_linear_attention(torch.cat([qkv.double(), aggregated], dim=1), dim, 1e-15)


def random_map(heads: int, size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    qkv = torch.randn(1, heads * 96, size, size, generator=torch.Generator().manual_seed(0))
    return qkv.to(dtype).to(memory_format=torch.channels_last)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


# Heads, which are independent, are fewer than in the models: L0 to L2 have 16 at 16 x 16 tokens,
# XL0 and XL1 16 at 32 x 32 and 32 at 16 x 16. 15 x 15 is what bugs are looked for with, below.
@pytest.mark.parametrize(
    ("size", "kernel", "launches"), [(16, 5, 1), (16, 3, 1), (32, 3, 2), (15, 3, 1)]
)
def test_layers_of_the_models(launcher, size, kernel, launches):
    qkv = random_map(2, size)
    result, reports = attend(launcher, qkv, 32, kernel)
    assert len(reports) == launches
    # Operands of three products are rounded to 11 bits, and then the result.
    assert relative_error(result, attend_reference(qkv, 32, kernel)) < 4 * 2**-11
    assert torch.equal(result, attend(launcher, qkv, 32, kernel)[0])


def test_blocks_that_take_all_tiles_in_turn(launcher, monkeypatch):
    # As if there were two multiprocessors: they take one image each, and share the third.
    limits = launcher.limits
    monkeypatch.setattr(
        launcher, "limits", lambda tensor: limits(tensor)._replace(multiprocessors=2)
    )
    qkv = random_map(1, 32)
    images = torch.cat([qkv] * 3).to(memory_format=torch.channels_last)
    result, reports = attend(launcher, images, 32, 3)
    assert [report.grid for report in reports] == [(1, 1, 2), (2, 1, 1), (2, 1, 1)]
    assert relative_error(result[:1], attend_reference(qkv, 32, 3)) < 4 * 2**-11
    assert torch.equal(result[:2], result[1:])
    assert reports[0].unique_bytes["qkv"] == (2 * qkv.nbytes, 0)
    assert reports[0].unique_bytes["out"] == (0, 2 * result[0].nbytes)
    assert reports[0].unique_bytes["parts"] == (0, 0)


def test_counters(launcher):
    qkv = random_map(2, 16)
    result, (report,) = attend(launcher, qkv, 32, 5)
    total = {name: int(values.sum()) for name, values in report.counters.items()}
    assert total["wavefronts"] <= 1.1 * total["ideal_wavefronts"]
    assert total["sectors"] <= 1.15 * total["ideal_sectors"]
    weights = 6 * (25 + 32) * 32 * 2
    assert 32 * total["sectors"] <= 1.1 * (qkv.nbytes + result.nbytes + weights)


def test_tf32_is_pytorchs_setting(launcher):
    qkv = random_map(1, 8, torch.float32)
    expected = attend_reference(qkv, 32, 3)
    with tf32(False):
        assert relative_error(attend(launcher, qkv, 32, 3)[0], expected) < 1e-6
    with tf32(True):
        assert 1e-5 < relative_error(attend(launcher, qkv, 32, 3)[0], expected) < 4 * 2**-11


def test_head_dims_beyond_the_kernels_are_refused():
    operands = Case(OP, "wide", {"head_dim": 72, "heads": 1}).operands(torch.float16)
    with simt.emulate(), pytest.raises(ValueError, match="head_dim must be at most 64"):
        ek.ops.multi_scale_attention(**operands, backend="cuda")


MUTATIONS = {
    "barrier before warps add their states deleted": (
        "    __syncthreads();\n    constexpr int kSlots",
        "    constexpr int kSlots",
        "race",
    ),
    "barriers between warps that add their states deleted": (
        "      }\n      __syncthreads();\n    }\n    const int rows",
        "      }\n    }\n    const int rows",
        "race",
    ),
    "barrier after the last state deleted": (
        "  __device__ void round_states() {\n    __syncthreads();\n",
        "  __device__ void round_states() {\n",
        "race",
    ),
    "a warp reads what others of it have not written": (
        "      }\n    }\n    __syncwarp();\n  }\n\n  __device__ float4 scaled",
        "      }\n    }\n  }\n\n  __device__ float4 scaled",
        "race",
    ),
    "wait for a group too few": (
        "wait_for_copies<0>();\n          __syncthreads();\n          sum_state",
        "wait_for_copies<1>();\n          __syncthreads();\n          sum_state",
        "unfinished copy",
    ),
    "mask of the halo dropped": (
        "const bool there = y >= 0 && y < height && x >= 0 && x < width;",
        "const bool there = true;",
        "out of bounds",
    ),
    "mask of the stores dropped": (
        "        if (!is_there(tokens, token)) continue;\n",
        "",
        "out of bounds",
    ),
    "mask of the keys dropped": ("there[i % 2] ? relu(key)", "true ? relu(key)", "wrong result"),
    "order of a fragment's channels": (
        "__float_as_uint(a[step][0]), __float_as_uint(a[step][2])",
        "__float_as_uint(a[step][0]), __float_as_uint(a[step][1])",
        "wrong result",
    ),
    "tokens of a product and its other operand's out of order": (
        "__float_as_uint(key[0]), __float_as_uint(key[2])",
        "__float_as_uint(key[1]), __float_as_uint(key[3])",
        "wrong result",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_bugs_are_caught(launcher, monkeypatch, name):
    old, new, caught_as = MUTATIONS[name]
    source = (SOURCES / f"{OP}.cu").read_text(encoding="utf-8")
    assert source.count(old) == 1
    # One kernel of all, so that it compiles fast.
    head = source.replace(old, new).split("#define EVSAM_KERNELS")[0]
    module = simt.compile_cuda(
        head + "EVSAM_KERNEL(float16, half, 32, Float32::tf32)\n", options=["-I", str(SOURCES)]
    )

    def launch(source, kernel, grid, threads, shared, arguments):
        values = [(name, 0 if value is None else value) for name, value in arguments]
        emulator.current().launch(module, kernel, grid, threads, shared, values)

    monkeypatch.setattr(launcher, "launch", launch)
    qkv = random_map(1, 15)
    try:
        result, _ = attend(launcher, qkv, 32, 3)
    except simt.FaultError as error:
        assert caught_as in {fault.kind for fault in error.report.faults}
    else:
        assert caught_as == "wrong result"
        assert relative_error(result, attend_reference(qkv, 32, 3)) > 4 * 2**-11
