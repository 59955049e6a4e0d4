"""Bugs seeded into correct kernels: every one of them must be caught, and for what it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from support import simt_kernels

from evsam_kernels import simt

RACE, UNINITIALISED, OUTSIDE = "race", "uninitialised read", "out of bounds"
UNFINISHED = "unfinished copy"
WRONG = "wrong result"  # No rule is broken: only the comparison with float64 can tell.
CONFLICTS = "bank conflicts"  # Right and slow: only the counters can tell.


@dataclass(frozen=True)
class Mutation:
    """A bug: `old`, which occurs once in the source, becomes `new`."""

    name: str
    kernel: str
    old: str
    new: str
    caught_as: str


CUDA = [
    Mutation("barrier deleted", "gemm", "        __syncthreads();\n", "", RACE),
    Mutation("wait count off by one", "gemm", '"n"(STAGES - 2)', '"n"(STAGES - 1)', UNFINISHED),
    Mutation(
        "last steps commit nothing",
        "gemm",
        'asm volatile("cp.async.commit_group;" ::: "memory");',
        'if (step < steps) asm volatile("cp.async.commit_group;" ::: "memory");',
        UNFINISHED,
    ),
    Mutation("mask of the loads dropped", "gemm", "first + row < rows;", "true;", OUTSIDE),
    Mutation(
        "mask of the stores dropped", "gemm", "if (row < rows && column < columns)", "", OUTSIDE
    ),
    Mutation(
        "stage off by one",
        "gemm",
        "shared + step % STAGES * 2 * TILE * DEPTH;\n        const half* tile_b",
        "shared + (step + 1) % STAGES * 2 * TILE * DEPTH;\n        const half* tile_b",
        UNFINISHED,
    ),
    Mutation(
        "too few stages", "gemm", "load(step + STAGES - 1);", "load(step + STAGES);", UNINITIALISED
    ),
    Mutation(
        "row of a fragment off by one",
        "gemm",
        "i * 16 + lane % 16;",
        "i * 16 + (lane + 1) % 16;",
        WRONG,
    ),
    Mutation(
        "swizzle left out of the copy",
        "gemm",
        "tile + swizzled(row, chunk)",
        "tile + row * DEPTH + chunk * 8",
        WRONG,
    ),
    Mutation("swizzle removed", "gemm", "(chunk ^ (row >> 1 & 3)) * 8", "chunk * 8", CONFLICTS),
    Mutation(
        "barrier after a reduction deleted",
        "softmax",
        "__syncthreads();  // The next reduction uses the same memory.",
        "",
        RACE,
    ),
    Mutation(
        "barrier within a reduction deleted",
        "softmax",
        "= value;\n    __syncthreads();\n    value = partial[0]",
        "= value;\n    value = partial[0]",
        RACE,
    ),
    Mutation(
        "bound off by one",
        "softmax",
        "i < columns; i += blockDim.x)\n        y[",
        "i <= columns; i += blockDim.x)\n        y[",
        OUTSIDE,
    ),
    Mutation("one distance too few", "softmax", "distance = 16", "distance = 8", WRONG),
    Mutation("mask of the rows dropped", "layer_norm", "if (row >= rows) return;", "", OUTSIDE),
    Mutation(
        "first element left out",
        "layer_norm",
        "for (int i = lane; i < columns; i += 32)\n        y[",
        "for (int i = lane + 1; i < columns; i += 32)\n        y[",
        WRONG,
    ),
    Mutation("barrier deleted", "reduction", "    __syncthreads();\n", "", RACE),
    Mutation(
        "more partial sums than warps",
        "reduction",
        "threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0",
        "partial[threadIdx.x]",
        UNINITIALISED,
    ),
    Mutation("not atomic", "reduction", "atomicAdd(total, sum)", "*total += sum", RACE),
    Mutation("barrier deleted", "stencil", "    __syncthreads();\n", "", RACE),
    Mutation("rim too small", "stencil", "SIDE = TILE + 2", "SIDE = TILE + 1", OUTSIDE),
    Mutation("mask of the first row dropped", "stencil", "row >= 0 && ", "", OUTSIDE),
    Mutation(
        "mask of the stores dropped",
        "stencil",
        "if (row >= height || column >= width) return;",
        "",
        OUTSIDE,
    ),
    Mutation(
        "rim not filled",
        "stencil",
        "i < SIDE * SIDE; i += TILE * TILE",
        "i < SIDE * TILE; i += TILE * TILE",
        UNINITIALISED,
    ),
    Mutation("initialisation removed", "histogram", "own[bin] = 0;", ";", UNINITIALISED),
    Mutation(
        "barrier after the initialisation deleted",
        "histogram",
        "= 0;\n    __syncthreads();\n",
        "= 0;\n",
        RACE,
    ),
    Mutation(
        "barrier before the end deleted",
        "histogram",
        "1u);\n    __syncthreads();\n",
        "1u);\n",
        RACE,
    ),
    Mutation(
        "not atomic in shared memory",
        "histogram",
        "atomicAdd(&own[values[i]], 1u);",
        "own[values[i]] += 1;",
        RACE,
    ),
    Mutation(
        "one bin too few", "histogram", "unsigned own[BINS];", "unsigned own[BINS - 1];", OUTSIDE
    ),
    Mutation(
        "not atomic in global memory",
        "histogram",
        "atomicAdd(&counts[bin], own[bin]);",
        "counts[bin] += own[bin];",
        RACE,
    ),
    Mutation(
        "releasing fence deleted",
        "split_k",
        "        __threadfence();\n        last",
        "        last",
        RACE,
    ),
    Mutation(
        "acquiring fence deleted",
        "split_k",
        "== splits - 1;\n        __threadfence();",
        "== splits - 1;",
        RACE,
    ),
    Mutation("not atomic", "split_k", "atomicAdd(&arrived[row], 1u)", "arrived[row]++", RACE),
    Mutation(
        "barrier of the partial sums deleted",
        "split_k",
        "= sum;\n    __syncthreads();\n",
        "= sum;\n",
        RACE,
    ),
    Mutation("last too early", "split_k", "== splits - 1", "== splits - 2", UNINITIALISED),
    Mutation(
        "barrier after a tile deleted",
        "attention",
        "        }\n        __syncthreads();\n    }",
        "        }\n    }",
        RACE,
    ),
    Mutation(
        "barrier before a tile deleted",
        "attention",
        "        }\n        __syncthreads();\n        for",
        "        }\n        for",
        RACE,
    ),
    Mutation("mask of the keys dropped", "attention", "min(TILE, tokens - first)", "TILE", OUTSIDE),
    Mutation(
        "mask of the queries dropped",
        "attention",
        "    if (query < tokens)\n        for",
        "        for",
        OUTSIDE,
    ),
]


def is_caught(report: simt.Report, case: simt_kernels.Case, caught_as: str) -> bool:
    if caught_as == WRONG:
        return not report.faults and case.error > 3 * case.tolerance
    if caught_as == CONFLICTS:
        wavefronts, ideal = (
            int(report.counters[name].sum()) for name in ("wavefronts", "ideal_wavefronts")
        )
        return not report.faults and wavefronts > 1.5 * ideal
    return any(fault.kind == caught_as for fault in report.faults)


@pytest.mark.parametrize(
    "mutation", CUDA, ids=[f"{mutation.kernel}-{mutation.name}" for mutation in CUDA]
)
def test_bugs_in_cuda_kernels_are_caught(mutation: Mutation) -> None:
    source = simt_kernels.cuda_source(mutation.kernel)
    assert source.count(mutation.old) == 1
    case = simt_kernels.CUDA[mutation.kernel]()
    module = simt.compile_cuda(source.replace(mutation.old, mutation.new))
    report = case.launch(module)
    assert is_caught(report, case, mutation.caught_as), report


def test_a_correct_kernel_is_caught_as_nothing() -> None:
    case = simt_kernels.CUDA["gemm"]()
    report = case.launch(simt_kernels.cuda_module("gemm"))
    kinds = (RACE, UNINITIALISED, OUTSIDE, UNFINISHED, WRONG, CONFLICTS)
    assert not any(is_caught(report, case, kind) for kind in kinds)


def wait_for_one_group_less(ptx: str) -> str:
    return re.sub(
        r"(cp\.async\.wait_group\s+)(\d+)", lambda match: f"{match[1]}{int(match[2]) + 1}", ptx
    )


def delete(pattern: str) -> Callable[[str], str]:
    return lambda ptx: re.sub(pattern, "", ptx)


TRITON = {
    "barriers deleted": ("gemm-float16", delete(r"bar\.sync\s+0;"), RACE),
    "wait count off by one": ("gemm-float16", wait_for_one_group_less, UNFINISHED),
    "mask of the stores dropped": (
        "gemm-float32",
        delete(r"@%p\d+ (?=st\.global)"),
        OUTSIDE,
    ),
    "mask of the loads dropped": ("softmax-float32", delete(r"@%p\d+ (?=ld\.global)"), OUTSIDE),
    "barriers of a reduction deleted": ("total", delete(r"bar\.sync\s+0;"), RACE),
    "initialisation removed": (
        "total",
        delete(r"@%p\d+ st\.shared\S* [^;]*;"),
        UNINITIALISED,
    ),
    "mask of the atomics dropped": ("histogram", delete(r"@%p\d+ (?=ld\.global)"), OUTSIDE),
}


@pytest.mark.parametrize("name", TRITON)
def test_bugs_in_triton_s_ptx_are_caught(name: str) -> None:
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    kernel, mutate, caught_as = TRITON[name]
    case = simt_kernels.TRITON[kernel]()
    correct = case.compile()
    ptx = mutate(correct.ptx)
    assert ptx != correct.ptx
    mutant = simt.TritonModule(
        ptx,
        sources=correct.sources,
        name=correct.name,
        warps=case.num_warps,
        shared=correct.shared,
    )
    report = case.case.launch(mutant)
    assert is_caught(report, case.case, caught_as), report
