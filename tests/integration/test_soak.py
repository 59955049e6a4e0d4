"""A thousand forwards of a fused encoder leave memory as it was."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch

PICTURE = (1, 3, 32, 32)


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_memory_stays_flat(fused):
    x = torch.randn(PICTURE)
    output_bytes = fused(x).nbytes

    def run(count: int) -> int:
        for _ in range(count):
            fused(x)
        gc.collect()
        return resident_bytes()

    run(100)
    before, after, later = run(1), run(1000), run(1000)
    # One thousandth of the outputs, had they stayed: 4 KiB of every forward. What is not left
    # behind but touched late comes once: a thread's part of the working memory, say, where
    # threads wait for a core.
    assert min(after - before, later - after) < output_bytes


def test_no_tensor_outlives_its_forward(fused):
    """Beside the output, and what is made of the weights at the first forward."""
    x = torch.randn(PICTURE)
    fused(x)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    output = fused(x)
    assert tensors() == before + 1
    gone = weakref.ref(output)
    del output
    assert gone() is None
    assert tensors() == before
