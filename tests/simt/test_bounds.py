"""Bounds follow from the counters by the published rates, and claim no more than they may."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support import simt_kernels

from evsam_kernels import simt

A100_CLOCK = 1410e6


def counted(source: str, blocks: int, threads: int, *args: object) -> simt.Report:
    """The report of a kernel called "kernel"."""
    return simt.compile_cuda(source).launch("kernel", blocks, threads, 0, list(args))


def term(bound: simt.Bound, limit: str) -> simt.Term:
    return next(term for term in bound.terms if term.limit == limit)


def test_tensor_work_of_a_gemm_is_its_flop() -> None:
    case = simt_kernels.gemm(rows=128, columns=64, depth=96)
    report = case.launch(simt_kernels.cuda_module("gemm"))
    work = simt.Work.of(report)
    flop = 2 * 128 * 64 * 96
    assert work.blocks == 2
    assert work.amounts["tensor f16"] == flop
    # Two blocks keep two multiprocessors busy, and no more.
    tensor = term(simt.bound(report), "tensor f16")
    assert tensor.seconds == pytest.approx(flop / 2 / (2048 * A100_CLOCK))


def test_dram_and_l2_move_every_byte_once_and_copies_past_l1_each_time() -> None:
    case = simt_kernels.gemm(rows=128, columns=128, depth=64)
    report = case.launch(simt_kernels.cuda_module("gemm"))
    work = simt.Work.of(report)
    inputs, output = 2 * 128 * 64 * 2, 128 * 128 * 2
    assert work.amounts["DRAM"] == inputs + output
    # Two blocks read every tile.
    assert work.amounts["L2 reads"] == 2 * inputs
    bound = simt.bound(report)
    assert term(bound, "DRAM").seconds == pytest.approx((inputs + output) / 1555e9)
    assert term(bound, "L2 reads").seconds == pytest.approx(2 * inputs / (5120 * A100_CLOCK))


def test_special_functions_take_the_pipe_for_32_lanes() -> None:
    source = """
extern "C" __global__ void kernel(float* x) {
    if (threadIdx.x < 3) x[threadIdx.x] = exp2f(__sinf(x[threadIdx.x]));
}"""
    work = simt.Work.of(counted(source, 1, 32, np.ones(3, np.float32)))
    assert work.amounts["special function"] == 2 * 32
    # A load that L1 may serve; yet its bytes come through L2 once.
    assert work.amounts["L2 reads"] == 3 * 4


def test_multiplications_may_become_part_of_additions() -> None:
    source = """
extern "C" __global__ void kernel(float* x) {
    float a = x[threadIdx.x];
    a = __fmaf_rn(a, a, a);
    a = __fmul_rn(a, 3) ;
    a = __fmul_rn(a, a);
    a = __fadd_rn(a, 5);
    x[threadIdx.x] = a;
}"""
    work = simt.Work.of(counted(source, 1, 32, np.ones(32, np.float32)))
    assert work.amounts["fp32"] == 32 * (1 + 2)
    # With a load and a store, and without what only computes addresses.
    assert work.amounts["issue"] == 3 + 2


def test_work_is_quantised_by_blocks_over_multiprocessors() -> None:
    amounts = {"fp32": 64.0 * 1e6}
    seconds = [simt.bound(simt.Work(blocks, amounts)).seconds for blocks in (1, 107, 108, 109, 216)]
    alone = 1e6 / A100_CLOCK
    expected = [alone * math.ceil(blocks / 108) / blocks for blocks in (1, 107, 108, 109, 216)]
    assert seconds == pytest.approx(expected)
    # Caches and memory are shared by all.
    dram = {"DRAM": 1555e9}
    assert simt.bound(simt.Work(1, dram)).seconds == simt.bound(simt.Work(108, dram)).seconds == 1


def test_kinds_of_tensor_work_share_the_pipe() -> None:
    work = simt.Work(108, {"tensor f16": 312e12, "tensor tf32": 156e12})
    (only,) = simt.bound(work).terms
    assert only.seconds == pytest.approx(2, rel=1e-3)


def test_the_binding_term_is_named_with_its_rate() -> None:
    work = simt.Work(108, {"DRAM": 1555e3, "fp32": 1.0})
    bound = simt.bound(work)
    assert bound.binding is bound.terms[0]
    assert str(bound) == (
        "NVIDIA A100 SXM 40 GB: at least 1 us, bound by DRAM "
        "(1.555e+06 bytes in 108 blocks, at 1.555e+12 bytes/s)"
    )
    assert simt.bound(work, "a100-80gb").seconds == pytest.approx(1555e3 / 2039e9)


def test_what_has_no_published_rate_is_left_out_and_named() -> None:
    work = simt.Work(1, {"L2 reads": 1e9, "DRAM": 1.0, "tensor f64": 1.0})
    bound = simt.bound(work, "h100-sxm")
    assert [term.limit for term in bound.terms] == ["DRAM"]
    assert bound.uncounted == ("L2 reads", "tensor f64")


def test_a_launch_that_does_nothing_has_no_bound() -> None:
    bound = simt.bound(simt.Work(1, {}))
    assert (bound.binding, bound.seconds) == (None, 0.0)
    assert "nothing was counted" in str(bound)


def test_an_unchecked_launch_has_no_bound() -> None:
    case = simt_kernels.CUDA["softmax"]()
    report = case.launch(simt_kernels.cuda_module("softmax"), check=False)
    with pytest.raises(ValueError, match="launch it with check=True"):
        simt.bound(report)


def test_every_kernel_has_a_bound_on_every_gpu() -> None:
    case = simt_kernels.CUDA["attention"]()
    report = case.launch(simt_kernels.cuda_module("attention"))
    for gpu in simt.GPUS:
        bound = simt.bound(report, gpu)
        assert bound.seconds == max(term.seconds for term in bound.terms) > 0
        assert {"fp32", "special function", "issue", "shared memory", "DRAM"} <= {
            term.limit for term in bound.terms
        }


@pytest.mark.parametrize(
    ("opcode", "limit", "operations"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "tensor f16", 4096),
        ("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16", "tensor f16 into f16", 2048),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor bf16", 4096),
        ("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", "tensor tf32", 1024),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.u8.s8.s32", "tensor s8", 8192),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", "tensor f64", 512),
    ],
)
def test_mma_is_counted_by_shape_and_types(opcode: str, limit: str, operations: int) -> None:
    from evsam_kernels.simt.bounds import _opcode, _tensor

    assert _tensor(_opcode(f"@%p1 {opcode} {{%r1}}, {{%r2}};")[1:]) == (limit, operations)
