"""Measured masks: definitions written out, and backends that agree bit by bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis.extra import numpy as hnp

from evsam_kernels import BackendUnavailableError
from evsam_kernels.numerics.validation import available_backends
from evsam_kernels.ops import measure_masks
from evsam_kernels.ops.measure_masks import cpu, reference
from evsam_kernels.ops.measure_masks.reference import Sizes, mask_boxes, upscale_masks
from evsam_kernels.ops.native import native

BACKENDS = available_backends("measure_masks", "cpu", torch.float32)
SIZES = {
    "landscape": Sizes((1024, 1024), (683, 1024), (133, 200)),
    "portrait": Sizes((1024, 1024), (1024, 700), (1200, 820)),
    "square": Sizes((1024, 1024), (1024, 1024), (1024, 1024)),
    "a line": Sizes((1024, 1024), (1, 1024), (1, 300)),
    "a few pixels": Sizes((1024, 1024), (512, 1024), (2, 4)),
    "frame of the logits' size": Sizes((64, 64), (64, 40), (96, 60)),
    "frame smaller than the logits": Sizes((40, 40), (40, 31), (96, 75)),
}


def smooth_logits(count: int, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    """Blobs `[count, height, width]` with values like those of a mask decoder."""
    coarse = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(8 * coarse, (height, width), mode="bicubic")[:, 0]


def by_definition(logits, sizes, threshold, offset):
    upscaled = upscale_masks(logits[:, None], sizes)[:, 0].numpy()
    masks = upscaled > threshold
    boxes = []
    for mask in masks:
        y, x = mask.nonzero()
        boxes.append([x.min(), y.min(), x.max(), y.max()] if mask.any() else [0, 0, 0, 0])
    inner, outer = ((upscaled > threshold + sign * offset).sum((1, 2)) for sign in (1, -1))
    return inner, outer, np.array(boxes), masks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("threshold", "offset"), [(0.0, 1.0), (-1.5, 0.0), (2.0, 0.25)])
def test_measures_are_those_of_the_upscaled_logits(backend, sizes, threshold, offset):
    logits = smooth_logits(12)
    found = measure_masks(logits, sizes, threshold=threshold, offset=offset, backend=backend)
    for ours, theirs in zip(found, by_definition(logits, sizes, threshold, offset), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.boxes.dtype == found.inner.dtype == torch.int64
    assert found.masks.dtype == torch.bool
    bare = measure_masks(
        logits, sizes, threshold=threshold, offset=offset, with_masks=False, backend=backend
    )
    assert bare.masks is None
    for ours, theirs in zip(bare[:3], found[:3], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_at_a_threshold_fall_where_the_reference_has_them(backend):
    # Multiples of a half, so that whole regions and the middle of every edge lie at a threshold.
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-4, 5, (20, 16, 16), generator=generator) / 2
    logits[0] = 1.0
    logits[1] = float("nan")
    logits[2, 3, 4] = float("inf")
    sizes = Sizes((64, 64), (48, 64), (37, 50))
    found = measure_masks(logits, sizes, backend=backend)
    for ours, theirs in zip(found, by_definition(logits, sizes, 0.0, 1.0), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels were not built")
@pytest.mark.parametrize("known", [True, False])
def test_close_values_are_resolved_where_the_rounding_is_known(monkeypatch, known):
    sizes, logits = SIZES["landscape"], smooth_logits(40, 32, 32)
    expected = measure_masks(logits, sizes, backend="reference")
    if not known:
        monkeypatch.setattr(cpu, "_rounding_is_known", lambda *_: False)
    left: list[int] = []

    def counted(*arguments):
        left.append(len(arguments[0]))
        return reference.measure_masks(*arguments)

    # In place of the module, as the test's own results come from it too.
    monkeypatch.setattr(cpu, "reference", SimpleNamespace(**vars(reference)))
    monkeypatch.setattr(cpu.reference, "measure_masks", counted)
    found = measure_masks(logits, sizes, backend="cpu")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    resolves = known and cpu._rounding_is_known((32, 32), sizes, torch.get_num_threads())
    assert (not left) if resolves else len(left) > 2


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels were not built")
@pytest.mark.parametrize("sizes", [SIZES["landscape"], SIZES["portrait"]], ids=["down", "up"])
def test_another_rounding_is_noticed(monkeypatch, sizes):
    """That of a PyTorch compiled for processors without fused products, for instance."""

    def upscaled_in_double(logits, sizes):
        framed = F.interpolate(logits.double(), sizes.frame, mode="bilinear")
        height, width = sizes.picture
        return F.interpolate(framed[..., :height, :width], sizes.image, mode="bilinear").float()

    monkeypatch.setattr(cpu.reference, "upscale_masks", upscaled_in_double)
    assert not cpu._rounding_is_known.__wrapped__((64, 64), sizes, torch.get_num_threads())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_strides_are_float32_first(backend, dtype):
    logits = smooth_logits(4, 64, 80).to(dtype).transpose(1, 2)
    sizes = Sizes((128, 128), (100, 128), (50, 64))
    found = measure_masks(logits, sizes, backend=backend)
    expected = by_definition(logits.float().contiguous(), sizes, 0.0, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_masks_and_masks_of_few_pixels(backend):
    sizes = Sizes((64, 64), (64, 64), (30, 30))
    empty = measure_masks(torch.zeros(0, 16, 16), sizes, backend=backend)
    assert [tuple(value.shape) for value in empty] == [(0,), (0,), (0, 4), (0, 30, 30)]
    tiny = measure_masks(torch.full((1, 2, 1), 3.0), sizes, backend=backend)
    assert tiny.inner.tolist() == [900]
    assert tiny.boxes.tolist() == [[0, 0, 29, 29]]


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7)))
def test_boxes_are_the_outermost_pixels(masks):
    boxes = mask_boxes(torch.from_numpy(masks))
    assert boxes.dtype == torch.int64
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        y, x = mask.nonzero()
        assert box == ([x.min(), y.min(), x.max(), y.max()] if mask.any() else [0, 0, 0, 0])


def test_bad_arguments_are_refused():
    sizes = SIZES["square"]
    with pytest.raises(TypeError, match=r"logits must be floating, got torch\.bool"):
        measure_masks(torch.zeros(1, 4, 4, dtype=torch.bool), sizes)
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor, got list"):
        measure_masks([], sizes)
    with pytest.raises(ValueError, match=r"shape \[N, h, w\], got \(4, 4\)"):
        measure_masks(torch.zeros(4, 4), sizes)
    with pytest.raises(ValueError, match="picture within the frame"):
        measure_masks(torch.zeros(1, 4, 4), Sizes((8, 8), (9, 8), (8, 8)))
    with pytest.raises(ValueError, match="offset must not be negative, got -1"):
        measure_masks(torch.zeros(1, 4, 4), sizes, offset=-1)
    with pytest.raises(BackendUnavailableError, match="'triton'"):
        measure_masks(torch.zeros(1, 4, 4), sizes, backend="triton")


AXIS_FAULTS = {
    "rows must begin at positions that rise from 0 to at most 1": lambda both, frame, image: (
        (both[0][::-1].copy(), both[1]),
        frame,
        image,
    ),
    r"rows must have weights of the shape \[3, 6\]": lambda both, frame, image: (
        (both[0], both[1][:2]),
        frame,
        image,
    ),
    "rows' frame must begin at positions from 0 to at most 2": lambda both, frame, image: (
        both,
        (frame[0] + 1, frame[1]),
        image,
    ),
    "rows' image must begin at positions from 0 to at most 6": lambda both, frame, image: (
        both,
        frame,
        (image[0] - 1, image[1]),
    ),
    "rows must have as many positions in the image": lambda both, frame, image: (
        both,
        frame,
        (image[0][:5], image[1][:, :5].copy()),
    ),
}


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels were not built")
@pytest.mark.parametrize("message", AXIS_FAULTS)
def test_positions_outside_the_maps_are_refused_before_the_kernel(message):
    rows, columns = cpu._axes((4, 4), Sizes((8, 8), (8, 8), (6, 6)))
    arguments = {"logits": np.zeros((1, 4, 4), np.float32), "columns": columns}
    wanted = np.arange(6)
    assert native().resize_masks(**arguments, rows=rows, wanted=wanted).shape == (1, 6, 6)
    with pytest.raises(ValueError, match=message):
        native().resize_masks(**arguments, rows=AXIS_FAULTS[message](*rows), wanted=wanted)
    with pytest.raises(ValueError, match="wanted must be rows of the output, from 0 to 5"):
        native().resize_masks(**arguments, rows=rows, wanted=wanted + 1)
