"""The shared decoder's Triton kernels, run in the executor."""

from __future__ import annotations

import copy

import pytest
import torch
from support.decoders import assert_close, exactly, plain_decoder, prompts

from evsam_kernels import simt
from evsam_kernels.sam.shared_decoder import SharedMaskDecoder
from evsam_kernels.simt.resources import resources

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("evsam_kernels._simt", reason="the executor was not built")

stages = pytest.importorskip("evsam_kernels.ops.shared_mask_decoder.triton")

LAUNCHES = 6
"""Two of attention and of updates by block, the last attention and the upscaling."""


def on_triton(decoder):
    return SharedMaskDecoder(copy.deepcopy(decoder), backend="triton")


@pytest.mark.parametrize(
    ("points", "multimask", "size"), [(0, True, (8, 8)), (1, False, (9, 11)), (12, True, (3, 7))]
)
def test_kernels_keep_the_budget(points, multimask, size):
    decoder = plain_decoder()
    inputs = prompts(points, batch=16, size=size)
    with simt.emulate() as emulation:
        ours = on_triton(decoder)(*inputs, multimask)
    assert len(emulation.launches) == LAUNCHES
    assert_close(ours, decoder(*inputs, multimask), exactly(decoder, inputs, multimask))


def test_positions_are_split_over_blocks():
    decoder = plain_decoder()
    inputs = prompts(1, batch=16, size=(10, 13))
    with simt.emulate() as emulation:
        ours = on_triton(decoder)(*inputs, True)
    first = next(one.report for one in emulation.launches if one.report.kernel == "attend_kernel")
    assert first.grid[0] > 1
    assert_close(ours, decoder(*inputs, True), exactly(decoder, inputs, True))


def test_large_image_features():
    decoder = plain_decoder()
    inputs = prompts(2, batch=16, size=(6, 7), scale=300.0)
    with simt.emulate():
        ours = on_triton(decoder)(*inputs, True)
    assert_close(ours, decoder(*inputs, True), exactly(decoder, inputs, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    decoder = plain_decoder().to(dtype)
    inputs = prompts(1, batch=16, size=(6, 7), dtype=dtype)
    with simt.emulate():
        ours = on_triton(decoder)(*inputs, True)
    assert all(result.dtype == dtype for result in ours)
    assert_close(ours, decoder(*inputs, True), exactly(decoder, inputs, True), dtype)


def test_prompts_without_a_mask_that_is_kept():
    decoder = plain_decoder()
    image, pe, tokens, dense = prompts(1, batch=6, size=(6, 7))
    want, iou = decoder(image, pe, tokens, dense, True)
    in_order = iou.flatten().sort().values
    for threshold, count in ((float(in_order[11:13].mean()), 6), (float(in_order[-1]) + 1, 0)):
        with simt.emulate():
            masks, scores = on_triton(decoder).decode_above(
                threshold,
                image_embeddings=image,
                image_pe=pe,
                sparse_prompt_embeddings=tokens,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
        kept = scores > threshold
        assert len(masks) == kept.sum() == count
        torch.testing.assert_close(masks, want[kept], rtol=1e-4, atol=1e-4)


def test_the_same_every_time_and_whatever_the_batch():
    decoder = plain_decoder()
    image, pe, tokens, dense = prompts(1, batch=4, size=(6, 7))
    with simt.emulate():
        ours = on_triton(decoder)
        first = ours(image, pe, tokens, dense, True)
        again = ours(image, pe, tokens, dense, True)
        part = ours(image, pe, tokens[:2], dense[:2], True)
    for one, other, some in zip(first, again, part, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one[:2], some, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tf32", [False, True])
def test_of_one_point_on_an_a100(tf32, monkeypatch):
    """Registers suffice, and a prompt moves no more than 11 MB."""
    monkeypatch.setattr(stages, "_precision", lambda: "tf32" if tf32 else "tf32x3")
    batch = 16
    inputs = prompts(1, batch=batch, size=(64, 64))
    with simt.emulate(sample=2) as emulation:
        on_triton(plain_decoder())(*inputs, True)
    assert len(emulation.launches) == LAUNCHES
    moved = 0.0
    for launch in emulation.launches:
        used = resources(launch.module, 80)[launch.report.kernel]
        assert not used.spill_stores and not used.spill_loads, launch.report.kernel
        moved += simt.bound(launch.report).work.amounts["DRAM"]
    assert moved / batch < 11e6
