"""Mask algebra against definitions written out pixel by pixel."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evsam_kernels.sam.masks import (
    Crop,
    box_nms,
    box_to_xywh,
    boxes_at_crop_edge,
    crop_windows,
    layer_point_grids,
    masks_to_rle,
    point_grid,
    remove_small_regions,
    rle_area,
    rle_to_coco,
    rle_to_mask,
    uncrop_masks,
)

mask_stacks = hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7))
single_masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, pixel by pixel."""
    counts, current = [0], False
    for pixel in mask.T.ravel():
        if pixel != current:
            counts.append(0)
            current = pixel
        counts[-1] += 1
    return counts


@given(mask_stacks)
def test_rle_is_the_run_lengths_down_the_columns(masks):
    for mask, rle in zip(masks, masks_to_rle(torch.from_numpy(masks)), strict=True):
        assert rle == {"size": list(mask.shape), "counts": runs_of(mask)}


@given(mask_stacks)
def test_rle_round_trip_and_area(masks):
    tensor = torch.from_numpy(masks)
    for mask, rle in zip(masks, masks_to_rle(tensor), strict=True):
        decoded = rle_to_mask(rle)
        assert decoded.dtype == np.bool_
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, mask)
        assert rle_area(rle) == mask.sum()
    np.testing.assert_array_equal(tensor, masks)


def test_rle_of_no_masks():
    assert masks_to_rle(torch.zeros(0, 4, 5, dtype=torch.bool)) == []


def test_rle_holds_plain_integers():
    json.dumps(masks_to_rle(torch.eye(3, dtype=torch.bool)[None]))


@pytest.mark.parametrize("counts", [[3], [5, 2], [10, -4], []])
def test_rle_of_the_wrong_length_is_refused(counts):
    with pytest.raises(ValueError, match="add up to 2 x 3 = 6 pixels"):
        rle_to_mask({"size": [2, 3], "counts": counts})


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning:pycocotools")
@given(single_masks)
def test_coco_rle_decodes_with_pycocotools(mask):
    coco_mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is optional")
    rle = rle_to_coco(masks_to_rle(torch.from_numpy(mask)[None])[0])
    assert json.loads(json.dumps(rle)) == rle
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)


def test_coco_rle_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        rle_to_coco({"size": [1, 1], "counts": [1]})


def test_box_to_xywh():
    boxes = torch.tensor([[1, 2, 11, 22], [5, 5, 5, 5]])
    assert box_to_xywh(boxes).tolist() == [[1, 2, 10, 20], [5, 5, 0, 0]]
    assert box_to_xywh(boxes[0]).tolist() == [1, 2, 10, 20]


def nms_by_definition(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Box by box and pair by pair, in float32 as torchvision's CPU kernel."""
    kept: list[int] = []
    boxes = boxes.astype(np.float32)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in sorted(range(len(scores)), key=lambda position: -scores[position]):
        for other in kept:
            low = np.maximum(boxes[index, :2], boxes[other, :2])
            high = np.minimum(boxes[index, 2:], boxes[other, 2:])
            inter = np.prod(np.maximum(high - low, np.float32(0)))
            union = area[other] + area[index] - inter
            if union > 0 and float(inter / union) > threshold:
                break
        else:
            kept.append(index)
    return kept


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 4, st.integers(0, 3)), max_size=25),
    st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0]),
)
def test_nms(rows, threshold):
    # Few coordinates and few scores: equal boxes, equal scores and IoU at the threshold abound.
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    boxes = np.concatenate([table[:, :2], table[:, :2] + table[:, 2:4]], axis=1)
    kept = box_nms(torch.from_numpy(boxes), torch.from_numpy(table[:, 4]) / 4, threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == nms_by_definition(boxes, table[:, 4], threshold)


def test_nms_keeps_the_best_in_order_of_score():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 10]])
    assert box_nms(boxes, torch.tensor([0.5, 0.6, 0.9, 0.6]), 0.7).tolist() == [2, 1]


def test_nms_drops_only_above_the_threshold():
    boxes = torch.tensor([[0, 0, 2, 1], [0, 0, 1, 1]])  # IoU 1/2
    scores = torch.tensor([1.0, 0.5])
    assert box_nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert box_nms(boxes, scores, 0.49).tolist() == [0]


def test_nms_does_not_round_the_threshold():
    boxes = torch.tensor([[0, 0, 10, 1], [0, 0, 1, 1]])
    # In float32 the IoU of 1/10 is a little above the double 0.1, and torchvision drops the box.
    assert box_nms(boxes, torch.tensor([1.0, 0.5]), 0.1).tolist() == [0]


def test_nms_of_boxes_without_area_keeps_them():
    assert box_nms(torch.zeros(3, 4), torch.ones(3), 0.5).tolist() == [0, 1, 2]


def regions_by_flood(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected regions, in reading order of their first pixel."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    for seed in sorted(left):
        if seed not in left:
            continue
        region, frontier = set(), [seed]
        while frontier:
            y, x = frontier.pop()
            if (y, x) in left:
                left.remove((y, x))
                region.add((y, x))
                frontier += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        regions.append(region)
    return regions


@settings(deadline=None)
@given(single_masks, st.integers(1, 12))
def test_small_regions_by_definition(mask, min_area):
    pytest.importorskip("scipy.ndimage", reason="scipy is optional")
    before = mask.copy()
    expected = mask.copy()
    holes = [region for region in regions_by_flood(~mask) if len(region) < min_area]
    for region in holes:
        expected[tuple(zip(*region, strict=True))] = True
    islands = regions_by_flood(expected)
    small = [region for region in islands if len(region) < min_area]
    survivor = max(islands, key=len) if islands and len(small) == len(islands) else None
    for region in small:
        if region is not survivor:
            expected[tuple(zip(*region, strict=True))] = False

    cleaned, changed = remove_small_regions(mask, min_area)

    np.testing.assert_array_equal(cleaned, expected)
    assert cleaned.dtype == np.bool_
    assert changed == bool(holes or small)
    np.testing.assert_array_equal(mask, before)


def test_small_regions_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(ImportError, match="min_mask_region_area needs scipy: pip install scipy"):
        remove_small_regions(np.ones((2, 2), bool), 1)


def test_point_grid_is_row_after_row_in_cell_centres():
    expected = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    np.testing.assert_allclose(point_grid(2), expected)
    np.testing.assert_allclose(point_grid(1), [[0.5, 0.5]])


def test_layer_grids_get_coarser():
    assert [len(grid) for grid in layer_point_grids(9, 2, 2)] == [81, 16, 4]
    assert [len(grid) for grid in layer_point_grids(3, 2, 1)] == [9, 9, 9]


def test_a_layer_without_points_is_refused():
    with pytest.raises(ValueError, match="no points in crop layer 2 of points_per_side 8"):
        layer_point_grids(8, 2, 3)


def test_crop_windows():
    # Overlap 40 pixels: windows of (200 + 40) / 2 by (100 + 40) / 2, columns first.
    assert crop_windows((100, 200), 1, 0.4) == [
        Crop((0, 0, 200, 100), 0),
        Crop((0, 0, 120, 70), 1),
        Crop((0, 30, 120, 100), 1),
        Crop((80, 0, 200, 70), 1),
        Crop((80, 30, 200, 100), 1),
    ]


def test_crop_windows_of_later_layers_overlap_less():
    second = [crop.box for crop in crop_windows((100, 200), 2, 0.4) if crop.layer == 2]
    # Overlap 20 pixels: windows of (200 + 3 * 20) / 4 by (100 + 3 * 20) / 4.
    assert len(second) == 16
    assert second[:5] == [
        (0, 0, 65, 40),
        (0, 20, 65, 60),
        (0, 40, 65, 80),
        (0, 60, 65, 100),
        (45, 0, 110, 40),
    ]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3), st.floats(0, 0.9))
def test_crop_windows_cover_the_image_and_have_pixels(height, width, n_layers, ratio):
    crops = crop_windows((height, width), n_layers, ratio)
    for layer in range(n_layers + 1):
        covered = np.zeros((height, width), bool)
        for (x0, y0, x1, y1), crop_layer in crops:
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            if crop_layer == layer:
                covered[y0:y1, x0:x1] = True
        assert covered.all()


def test_boxes_cut_off_by_the_crop():
    crop = Crop((100, 0, 300, 200), 1)  # shares its top with the image
    boxes = torch.tensor(
        [
            [150, 50, 250, 150],  # inside
            [120, 50, 250, 150],  # left side within 20 of the crop's
            [121, 50, 250, 150],  # 21 away
            [150, 0, 250, 150],  # at the crop's top, which is the image's
            [150, 50, 250, 195],  # bottom
            [150, 50, 290, 150],  # right
        ]
    )
    cut = boxes_at_crop_edge(boxes, crop, (400, 600))
    assert cut.tolist() == [False, True, False, False, True, True]


def test_no_box_is_cut_off_by_the_image_itself():
    boxes = torch.tensor([[0, 0, 599, 399]])
    assert not boxes_at_crop_edge(boxes, Crop((0, 0, 600, 400), 0), (400, 600)).any()


def test_uncrop_puts_masks_back():
    masks = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    image = uncrop_masks(masks, Crop((5, 1, 9, 4), 1), (6, 12))
    assert image.shape == (2, 6, 12)
    assert torch.equal(image[:, 1:4, 5:9], masks)
    assert image.sum() == masks.sum()
