"""Paths follow from counts, time from the scoreboard, and the estimate ranks kernels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import pytest
import torch
from support import simt_kernels

from evsam_kernels import simt
from evsam_kernels.simt.module import executor
from evsam_kernels.simt.replay import Equations, constants, expand, flow
from evsam_kernels.simt.sass import EXIT, BasicBlock


def blocks(*successors: tuple[int, ...]) -> list[BasicBlock]:
    """Blocks of one instruction each."""
    return [BasicBlock(range(n, n + 1), following) for n, following in enumerate(successors)]


def path(graph: list[BasicBlock], **known: tuple[Sequence[float], float, float]) -> list[int]:
    """The blocks in turn; what is known is the copies in each block, executions and certainty."""
    copies, executions, certainty = zip(*known.values(), strict=True)
    equations = Equations(np.array(copies, float), np.array(executions), np.array(certainty))
    return expand(graph, flow(graph, equations)).tolist()


def test_a_loop_runs_as_often_as_what_is_in_it() -> None:
    graph = blocks((1,), (1, 2), (EXIT,))
    assert path(graph, mma=([0, 3, 0], 15, 1)) == [0, 1, 1, 1, 1, 1, 2]


def test_a_loop_that_is_tested_first() -> None:
    graph = blocks((1,), (3, 2), (1,), (EXIT,))
    assert path(graph, mma=([0, 0, 2, 0], 6, 1)) == [0, 1, 2, 1, 2, 1, 2, 1, 3]


def test_nested_loops() -> None:
    graph = blocks((1,), (2,), (2, 3), (1, 4), (EXIT,))
    inner, outer = ([0, 0, 1, 0, 0], 6, 1), ([0, 0, 0, 1, 0], 2, 1)
    assert path(graph, mma=inner, store=outer) == [0, 1, 2, 2, 2, 3, 1, 2, 2, 2, 3, 4]


def test_copies_of_an_unrolled_loop_and_its_remainder_share_the_count() -> None:
    graph = blocks((1,), (1, 2), (2, 3), (EXIT,))
    # Four times 3 and once 2, which a barrier in the remainder tells.
    found = path(graph, mma=([0, 4, 1, 0], 14, 1), barrier=([0, 0, 1, 0], 2, 1))
    assert found == [0, 1, 1, 1, 2, 2, 3]


def test_a_branch_that_is_skipped() -> None:
    graph = blocks((2, 1), (2,), (EXIT,))
    assert path(graph, store=([0, 1, 0], 0, 1)) == [0, 2]
    assert path(graph, store=([0, 1, 0], 1, 1)) == [0, 1, 2]


def test_every_second_round_goes_round_a_branch() -> None:
    graph = blocks((1,), (3, 2), (3,), (1, 4), (EXIT,))
    found = path(graph, mma=([0, 1, 0, 0, 0], 4, 1), store=([0, 0, 1, 0, 0], 2, 1))
    assert found.count(1) == 4
    assert found.count(2) == 2


def test_a_guess_says_how_a_loop_is_entered() -> None:
    # Block 1 goes past the loop of 2; without the guess nothing says that it is not taken.
    graph = blocks((2, 1), (3,), (2, 3), (EXIT,))
    mma, guess = ([0, 0, 1, 0], 4, 1), ([0, 1, 0, 0], 0, 0.01)
    assert path(graph, mma=mma, guess=guess) == [0, 2, 2, 2, 2, 3]


def instruction(
    pipe: str = "none",
    effect: str = "none",
    *,
    occupied: float = 0,
    latency: float = 0,
    moved: float = 0,
    groups: int = 0,
    reads: Sequence[int] = (),
    writes: Sequence[int] = (),
) -> Any:
    pipes = ("none", "tensor", "fma", "alu", "special", "uniform", "memory")
    effects = ("none", "branch", "barrier", "load", "store", "copy", "commit", "wait")
    return executor().ReplayInstruction(
        *(pipes.index(pipe), effects.index(effect), occupied, latency, moved, groups),
        *(list(reads), list(writes)),
    )


def replayed(
    code: list[Any], *, warps: int = 1, resident: int = 1, blocks: int = 1, **machine: float
) -> list[float]:
    settings = {"l2": 32.0, "branch": 1.0, "barrier": 0.0, "block": 0.0} | machine
    multiprocessor = executor().Multiprocessor(4, *settings.values())
    trace = np.arange(len(code), dtype=np.uint32)
    ends: list[float] = executor().replay(code, trace, multiprocessor, warps, resident, blocks)
    return ends


def test_a_scheduler_issues_one_instruction_a_cycle() -> None:
    code = [instruction()] * 10
    assert replayed(code) == [10]
    assert replayed(code, warps=4) == [10]
    assert replayed(code, warps=8) == [20]


def test_results_take_their_latency() -> None:
    chain = [instruction("fma", occupied=2, latency=7, reads=[1], writes=[1])] * 5
    assert replayed(chain) == [4 * 7 + 1]
    # Other warps fill the gaps.
    assert replayed(chain, warps=12)[0] < 1.5 * (4 * 7 + 1)


def test_a_pipe_takes_its_cycles_and_each_scheduler_has_its_own() -> None:
    product = [instruction("tensor", occupied=8)] * 10
    assert replayed(product) == [9 * 8 + 1]
    assert replayed(product, warps=4) == [9 * 8 + 1]
    assert replayed(product, warps=8) == [19 * 8 + 1]
    # The schedulers share one pipe to memory.
    shared = [instruction("memory", occupied=8, latency=20, writes=[1]), instruction(reads=[1])]
    assert replayed(shared) == [8 + 20 + 1]
    assert replayed(shared, warps=4) == [4 * 8 + 20 + 1]


def test_a_barrier_waits_for_all_warps_of_its_block() -> None:
    work = [instruction("memory", occupied=8, latency=0, writes=[1]), instruction(reads=[1])]
    code = [*work, instruction(effect="barrier"), instruction()]
    assert replayed(code, warps=4, barrier=5.0) == [4 * 8 + 1 + 1 + 5 + 1]
    # Blocks do not wait for each other.
    assert replayed(code, warps=1, resident=4, blocks=4, barrier=5.0)[0] == 8 + 1 + 1 + 5 + 1


def test_copies_are_waited_for_by_groups() -> None:
    copy = [instruction(effect="copy", latency=100, moved=64), instruction(effect="commit")]
    for left, end in ((2, 4), (1, 102), (0, 104)):
        code = [*copy, *copy, instruction(effect="wait", groups=left)]
        assert replayed(code)[0] == pytest.approx(end + 1, abs=1.01)


def test_l2_serves_its_share() -> None:
    load = [instruction("memory", "load", occupied=1, latency=10, moved=128, writes=[1])]
    code = [*load * 4, instruction(reads=[1])]
    assert replayed(code, l2=32.0) == [1 + 4 * 4 + 10 + 1]
    assert replayed(code, l2=128.0) == [4 + 1 + 10 + 1]


def test_blocks_follow_each_other_and_overlap() -> None:
    code = [instruction("fma", latency=50, reads=[1], writes=[1])] * 4
    alone = replayed(code)[0]
    assert replayed(code, blocks=3, block=9.0) == [alone, 2 * alone + 9, 3 * alone + 18]
    assert replayed(code, resident=3, blocks=3)[-1] <= alone + 3


@pytest.mark.parametrize("change", [{"warps": 0}, {"blocks": 0}, {"resident": 0}, {"l2": 0.0}])
def test_impossible_machines_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replayed([instruction()], **change)


def launched(case: Any, module: simt.Module, **options: Any) -> simt.Launch:
    return simt.Launch(module, case.launch(module, **options))


def gemm(depth: int = 1024, stages: int = 3, warps: int = 4, tile: int = 64) -> simt.Launch:
    """A sample of a product of float16 [4096, depth] and [depth, 4096] in Triton."""
    case = simt_kernels.triton_gemm(torch.float16)
    types = case.signature | {"rows": "i32:16"}
    tiles = {"ROWS": tile, "COLUMNS": tile, "DEPTH": 32, "PRECISION": "ieee"}
    module = simt.compile_triton(case.kernel, types, tiles, num_warps=warps, num_stages=stages)
    a = torch.zeros(4096, depth, dtype=torch.float16)
    args = [a, a, torch.empty(4096, 4096, dtype=torch.float16), 4096, 4096, depth]
    grid = (4096 // tile, 4096 // tile)
    report = module.launch("gemm", grid, module.block, module.shared, args, blocks=[0, 1500])
    return simt.Launch(module, report)


@pytest.fixture(scope="module")
def plain() -> simt.Estimate:
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    return simt.replay(gemm())


def test_what_is_replayed_is_what_was_counted(plain: simt.Estimate) -> None:
    assert plain.counted["mma"] == 1024 // 16 * 64 * 64 // (16 * 8) // 4
    for kind in ("mma", "async copy", "matrix load", "barrier", "shared store"):
        assert plain.replayed[kind] == plain.counted[kind] > 0, kind


def test_a_cuda_kernel_with_nested_loops_and_masks() -> None:
    case = simt_kernels.gemm(rows=100, columns=72, depth=96)
    estimate = simt.replay(launched(case, simt_kernels.cuda_module("gemm")))
    assert estimate.replayed["mma"] == estimate.counted["mma"] > 0
    assert estimate.seconds > 0


def test_a_warps_barrier_is_none_of_the_block() -> None:
    module = simt.compile_cuda(
        """extern "C" __global__ void turn(float* x) {
            __shared__ float all[64];
            all[threadIdx.x] = x[threadIdx.x];
            __syncwarp();
            float next = all[threadIdx.x ^ 1];
            __syncthreads();
            x[threadIdx.x] = next + all[63 - threadIdx.x];
        }"""
    )
    report = module.launch("turn", grid=1, block=64, shared=0, args=[torch.zeros(64)])
    estimate = simt.replay(simt.Launch(module, report))
    assert estimate.replayed["barrier"] == estimate.counted["barrier"] == 1


def test_the_estimate_says_that_it_is_one(plain: simt.Estimate) -> None:
    assert "estimate, uncalibrated" in str(plain)


def test_no_estimate_is_below_the_bound(plain: simt.Estimate) -> None:
    launch = gemm()
    assert (
        simt.bound(launch.report).seconds <= plain.seconds < 20 * simt.bound(launch.report).seconds
    )


def test_twice_the_work_takes_twice_as_long(plain: simt.Estimate) -> None:
    deep = simt.replay(gemm(depth=2048))
    assert 1.6 < deep.seconds / plain.seconds < 2.1


def test_overlapping_copies_ranks_better_than_waiting_for_each(plain: simt.Estimate) -> None:
    assert simt.replay(gemm(stages=1)).seconds > 1.2 * plain.seconds


def test_tiny_tiles_rank_worse(plain: simt.Estimate) -> None:
    assert simt.replay(gemm(tile=32)).seconds > 1.2 * plain.seconds


def test_a_count_that_the_machine_code_cannot_have_is_refused() -> None:
    case = simt_kernels.gemm()
    launch = launched(case, simt_kernels.cuda_module("gemm"))
    products = [i for i, found in enumerate(launch.report.instructions) if found.kind == "mma"]
    launch.report.counters["warp_executions"][products[0]] *= 3
    with pytest.raises(simt.ReplayError, match="matrix products"):
        simt.replay(launch)


def test_counts_that_disagree_make_an_estimate_doubtful(plain: simt.Estimate) -> None:
    assert plain.disagreeing == ()
    assert "doubtful" not in str(plain)
    off = dataclasses.replace(plain, replayed=plain.replayed | {"barrier": 1.0})
    assert off.disagreeing == ("barrier",)
    assert "doubtful, as counts of barrier disagree" in str(off)


def test_what_cannot_be_replayed_is_refused() -> None:
    case = simt_kernels.gemm()
    module = simt_kernels.cuda_module("gemm")
    with pytest.raises(ValueError, match="check=True"):
        simt.replay(launched(case, module, check=False))
    with pytest.raises(ValueError, match="no latencies of sm_90"):
        simt.replay(launched(case, module), "h100-sxm")


def test_every_constant_has_a_source() -> None:
    text = resources.files("evsam_kernels.simt").joinpath("replay.json").read_text("utf-8")
    data = json.loads(text)
    for arch, entries in data["architectures"].items():
        assert constants(int(arch)).tensor_latency_k16 > 0
        for name, entry in entries.items():
            assert entry["value"] > 0, name
            assert data["sources"][entry["source"]]["title"], name
