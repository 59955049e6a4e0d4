"""Occupancy agrees with NVIDIA's own calculator wherever its header is installed."""

from __future__ import annotations

import importlib.util
import random
import subprocess
from pathlib import Path

import pytest

from evsam_kernels.simt.occupancy import ARCHITECTURES, occupancy

# Threads per multiprocessor, shared memory of a multiprocessor and of a block, in KiB, as the
# technical specifications of the CUDA programming guide have them.
DEVICES = {
    80: (2048, 164, 163),
    86: (1536, 100, 99),
    89: (1536, 100, 99),
    90: (2048, 228, 227),
    100: (2048, 228, 227),
    120: (1536, 100, 99),
}

# Reads lines of arch, limits, threads, registers, static and dynamic shared bytes and barriers.
PROGRAM = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int arch, threads_per_sm, sm_kib, block_kib, threads, registers, barriers;
    size_t fixed, dynamic;
    while (scanf("%d %d %d %d %d %d %zu %zu %d", &arch, &threads_per_sm, &sm_kib, &block_kib,
                 &threads, &registers, &fixed, &dynamic, &barriers) == 9) {
        cudaOccDeviceProp device;
        device.computeMajor = arch / 10, device.computeMinor = arch % 10;
        device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = threads_per_sm;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
        device.sharedMemPerBlock = 48 * 1024, device.sharedMemPerBlockOptin = block_kib * 1024;
        device.sharedMemPerMultiprocessor = sm_kib * 1024, device.reservedSharedMemPerBlock = 1024;
        device.numSms = 1;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
        kernel.sharedSizeBytes = fixed, kernel.maxDynamicSharedSizeBytes = dynamic;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.numBlockBarriers = barriers;
        cudaOccDeviceState state;
        cudaOccResult result;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                    dynamic))
            return 1;
        printf("%d\n", result.activeBlocksPerMultiprocessor);
    }
}
"""


def header_folder() -> Path | None:
    """Where cuda_occupancy.h is: a CUDA toolkit, NVIDIA's packages or Triton's wheel."""
    found = [Path("/usr/local/cuda/include")]
    for package, pattern in (("nvidia", "cu*/include"), ("triton", "backends/nvidia/include")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            found += Path(folder).glob(pattern)
    return next((folder for folder in found if (folder / "cuda_occupancy.h").is_file()), None)


def test_it_agrees_with_cuda_occupancy_h(tmp_path: Path) -> None:
    folder = header_folder()
    if folder is None:
        pytest.skip("cuda_occupancy.h comes with evsam-kernels[cuda], which is not installed")
    source, program = tmp_path / "compare.cpp", tmp_path / "compare"
    source.write_text(PROGRAM)
    subprocess.run(["c++", "-w", "-I", folder, source, "-o", program], check=True)
    draw = random.Random(0)
    cases = []
    for _ in range(30_000):
        arch = draw.choice(ARCHITECTURES)
        threads = draw.choice([draw.randint(1, 1024), 32 * draw.randint(1, 32)])
        shared = draw.choice([0, draw.randint(0, 48 * 1024), draw.randint(0, 230 * 1024)])
        fixed = min(shared, draw.choice([0, 16, 10_000]))
        cases.append((arch, threads, draw.randint(0, 255), fixed, shared, draw.randint(0, 16)))
    lines = [
        f"{arch} {' '.join(map(str, DEVICES[arch]))} {threads} {registers} "
        f"{fixed} {shared - fixed} {barriers}"
        for arch, threads, registers, fixed, shared, barriers in cases
    ]
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    theirs = list(map(int, done.stdout.split()))
    ours = [
        occupancy(
            arch, threads=threads, registers=registers, shared=shared, barriers=barriers
        ).blocks
        for arch, threads, registers, _, shared, barriers in cases
    ]
    assert len(set(theirs)) > 10
    different = [
        (case, our, their)
        for case, our, their in zip(cases, ours, theirs, strict=True)
        if our != their
    ]
    assert not different, different[:5]


def test_what_limits_is_named() -> None:
    full = occupancy(80, threads=256, registers=32)
    assert (full.blocks, full.warps, full.fraction, full.limited_by) == (8, 64, 1.0, "threads")
    tight = occupancy(80, threads=128, registers=255, shared=64 * 1024)
    assert (tight.blocks, tight.limited_by) == (2, "registers")
    assert tight.limits == {
        "threads": 16,
        "registers": 2,
        "shared memory": 2,
        "barriers": 32,
        "blocks": 32,
    }
    assert occupancy(86, threads=32, registers=16, shared=100 * 1024).blocks == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": 70}, "arch must be one of 80, 86, 89, 90, 100, 120, got 70"),
        ({"threads": 0}, "threads must be 1 to 1024, got 0"),
        ({"threads": 1025}, "threads must be 1 to 1024, got 1025"),
        ({"registers": 256}, "registers must be 0 to 255, got 256"),
        ({"shared": -1}, "shared must be 0 or more, got -1"),
        ({"barriers": 17}, "barriers must be 0 to 16, got 17"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        occupancy(**{"arch": 80, "threads": 128, "registers": 32, **arguments})
