"""A fused model beside others: in other processes, in DataLoader workers and in threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import evsam_kernels as ek


def encode_batches(module: nn.Module, given, found) -> None:
    """What a process runs: encodes what comes, until None does."""
    with torch.no_grad():
        while (x := given.get()) is not None:
            # As NumPy's array, which outlives the process.
            found.put(module(x).numpy())


def test_another_process_encodes(fused, pictures):
    """Started afresh, as `spawn` does; module and pictures reach it in shared memory."""
    expected = fused(pictures)
    context = multiprocessing.get_context("spawn")
    given, found = context.Queue(), context.Queue()
    fused.share_memory()
    process = context.Process(target=encode_batches, args=(fused, given, found), daemon=True)
    process.start()
    try:
        for x in (pictures, pictures[:1], None):
            given.put(x)
        for want in (expected, expected[:1]):
            assert torch.equal(torch.from_numpy(found.get(timeout=60)), want)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
    # What the other process was given is still here, and of use.
    assert torch.equal(fused(pictures), expected)


class Embeddings(Dataset):
    """Pictures that are encoded where they are loaded."""

    def __init__(self, module: nn.Module, pictures: Tensor) -> None:
        self.module, self.pictures = module, pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.module(self.pictures[index][None])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers_encode(fused, pictures, start):
    """Also forked from a process that has run kernels on several threads."""
    expected = fused(pictures)
    loader = DataLoader(
        Embeddings(fused, pictures),
        batch_size=1,
        num_workers=1,
        multiprocessing_context=start,
        timeout=60,
    )
    for found, want in zip(loader, expected, strict=True):
        # A worker computes on one thread and an image at a time: sums come in another order.
        torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-5)


def test_threads_share_a_module(encoder, pictures):
    """Which none of them has run before, so that they all find its weights unpacked."""
    inputs = [pictures, pictures[:1], -pictures, pictures.flip(-1)]
    expected = [ek.fuse(encoder)(x) for x in inputs]
    fused = ek.fuse(encoder)
    together = threading.Barrier(len(inputs))

    def encode(index: int) -> list[Tensor]:
        together.wait(60)
        with torch.no_grad():
            return [fused(inputs[index]) for _ in range(5)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        for found, want in zip(pool.map(encode, range(len(inputs))), expected, strict=True):
            assert all(torch.equal(one, want) for one in found)
