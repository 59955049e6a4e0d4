"""Cutting an encoder into blocks: all of it, in order, equal blocks once."""

from __future__ import annotations

from typing import Any

import torch

import evsam_kernels
from bench.blocks import blocks
from evsam_kernels.numerics.plain import evaluate
from evsam_kernels.sam.zoo import create_efficientvit_sam_model

SHAPE = (2, 3, 64, 64)


def test_names_shapes_and_counts(tiny_encoder: Any) -> None:
    found = blocks(tiny_encoder, SHAPE)
    assert [(block.name, block.count) for block in found] == [
        ("stages.0.op_list.0 ConvLayer 3->8 64x64 stride 2", 1),
        ("stages.0.op_list.1 ResBlock 8->8->8 32x32", 1),
        ("stages.1.op_list.0 FusedMBConv 8->64->8 32x32 stride 2", 1),
        ("stages.1.op_list.1 FusedMBConv 8->16->8 16x16", 1),
        ("stages.2.op_list.0 FusedMBConv 8->64->8 16x16 stride 2", 1),
        ("stages.2.op_list.1 FusedMBConv 8->16->8 8x8", 1),
        ("stages.3.op_list.0 MBConv 8->64->16 8x8 stride 2", 1),
        ("stages.3.op_list.1 MBConv 16->32->16 4x4", 2),
        ("stages.4.op_list.0 MBConv 16->128->32 4x4 stride 2", 1),
        ("stages.4.op_list.1 EfficientViTBlock 32->96->32->64->32 2x2", 2),
        ("neck.input_ops NeckInputs 32+16+8->256 2x2+4x4+8x8", 1),
        ("neck.middle.op_list.0 FusedMBConv 256->256->256 64x64", 2),
        ("neck.output_ops.0.op_list.0 ConvLayer 256->256 64x64", 1),
        ("norm LayerNorm2d 256 64x64", 1),
    ]
    assert found[0].shapes == (SHAPE,)
    assert found[10].shapes == ((2, 32, 2, 2), (2, 16, 4, 4), (2, 8, 8, 8))


def test_blocks_of_different_configuration_are_not_equal(tiny_encoder: Any) -> None:
    tiny_encoder.neck.middle.op_list[1].main.spatial_conv.norm.eps = 0.5
    found = blocks(tiny_encoder, SHAPE)
    assert [block.count for block in found if "neck.middle" in block.name] == [1, 1]


def test_the_blocks_in_turn_are_the_encoder(tiny_encoder: Any) -> None:
    """Equal blocks have weights of their own, so they are made equal first."""
    encoder = tiny_encoder
    for repeated in (encoder.backbone.stages[3], encoder.backbone.stages[4], encoder.neck.middle):
        repeated.op_list[-1].load_state_dict(repeated.op_list[-2].state_dict())
    x = picture = torch.randn(SHAPE, dtype=torch.float64)
    maps = {}
    for block in blocks(encoder, SHAPE):
        inputs = (x,)
        if "NeckInputs" in block.name:
            inputs = tuple(maps[shape] for shape in block.shapes)
        for _ in range(block.count):
            x = evaluate(block.module, inputs, torch.float64)
            inputs = (x,)
        maps[tuple(x.shape)] = x
    torch.testing.assert_close(x, evaluate(encoder, (picture,), torch.float64))


def test_every_block_is_fused(tiny_encoder: Any) -> None:
    for block in blocks(tiny_encoder, SHAPE):
        report: Any = evsam_kernels.fuse(block.module).fusion_report
        assert report.swapped, block.name
        assert not report.left, block.name


def test_the_encoder_is_left_as_it_was(tiny_encoder: Any) -> None:
    before = {key: value.clone() for key, value in tiny_encoder.state_dict().items()}
    blocks(tiny_encoder, SHAPE)
    after = tiny_encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_pre_hooks for module in tiny_encoder.modules())


def test_l0_has_fourteen_kinds_of_blocks() -> None:
    with torch.device("meta"):
        model = create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False)
    found = blocks(model.image_encoder, (1, 3, 512, 512))
    assert [block.count for block in found] == [1, 1, 1, 1, 1, 1, 1, 4, 1, 4, 1, 4, 1, 1]
    assert found[7].name == "stages.3.op_list.1 MBConv 256->1024->256 32x32"
