"""Fusing SAM's mask decoder, in a model of ours and in others'."""

from __future__ import annotations

import copy

import foreign
import pytest
import torch
from torch import nn

import evsam_kernels as ek
from evsam_kernels.numerics.budget import budget, measure
from evsam_kernels.sam.mask_decoder import MaskDecoder, TwoWayTransformer
from evsam_kernels.sam.shared_decoder import SharedMaskDecoder


def prompts(dtype=torch.float32, channels=256, points=2, batch=32):
    """So many that the errors of a few numbers do not decide."""
    generator = torch.Generator().manual_seed(0)
    image, pe, tokens, dense = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (1, channels, 6, 7),
            (1, channels, 6, 7),
            (batch, points, channels),
            (1, channels, 1, 1),
        )
    )
    return image, pe, tokens, dense.expand(batch, -1, 6, 7)


def decoders():
    return {
        "ours": lambda: MaskDecoder(transformer=TwoWayTransformer(mlp_dim=96)),
        "foreign": foreign.MaskDecoder,
        "foreign, one multimask": lambda: foreign.MaskDecoder(masks=1),
        "foreign, 128 channels": lambda: foreign.MaskDecoder(
            128, foreign.TwoWayTransformer(channels=128, heads=4)
        ),
    }


@pytest.mark.parametrize("make", decoders().values(), ids=decoders())
@pytest.mark.parametrize("multimask", [True, False])
def test_mask_decoders_are_swapped(randomised, make, multimask):
    decoder = randomised(make())
    before = copy.deepcopy(decoder.state_dict())
    fused = ek.fuse(nn.ModuleDict({"mask_decoder": decoder}).eval())
    (entry,) = fused.fusion_report.swapped
    assert entry.path == "mask_decoder"
    assert (entry.block, entry.operation) == ("MaskDecoder", "shared_mask_decoder")
    assert fused.fusion_report.left == []
    swapped = fused["mask_decoder"]
    assert type(swapped) is SharedMaskDecoder
    assert swapped.state_dict().keys() == before.keys()
    inputs = prompts(channels=decoder.transformer_dim)
    with torch.no_grad():
        ours, plain = swapped(*inputs, multimask), decoder(*inputs, multimask)
        exact = copy.deepcopy(decoder).double()(*(x.double() for x in inputs), multimask)
        for mine, theirs, want in zip(ours, plain, exact, strict=True):
            assert mine.shape == want.shape
            assert measure(mine, want).within(budget(measure(theirs, want), torch.float32))
        # Its weights are its own.
        decoder.mask_tokens.weight.zero_()
        assert torch.equal(swapped(*inputs, multimask)[0], ours[0])
    assert ek.fuse(swapped).state_dict().keys() == before.keys()


def test_dtype_and_backend(randomised):
    decoder = randomised(foreign.MaskDecoder())
    fused = ek.fuse(decoder, dtype=torch.bfloat16)
    with torch.no_grad():
        assert [x.dtype for x in fused(*prompts(), True)] == [torch.bfloat16] * 2
    reference = ek.fuse(decoder.double(), backend="reference")
    inputs = prompts(torch.float64)
    with torch.no_grad():
        for ours, want in zip(reference(*inputs, True), decoder(*inputs, True), strict=True):
            assert (ours - want).norm() / want.norm() < 1e-12
    left = ek.fuse(decoder, backend="cpu").fusion_report.left
    assert (left[0].path, left[0].block) == ("", "MaskDecoder")
    assert "backend 'cpu' has no kernel for it at torch.float64" in left[0].reason


def other_decoders():
    def with_(change):
        decoder = foreign.MaskDecoder()
        change(decoder)
        return decoder

    def set_(path, value):
        def change(decoder):
            module, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(module), name, value)

        return lambda: with_(change)

    return {
        "its transformer is not SAM's two blocks": lambda: foreign.MaskDecoder(
            transformer=foreign.TwoWayTransformer(depth=3)
        ),
        "its heads are not of 16 channels": lambda: foreign.MaskDecoder(
            transformer=foreign.TwoWayTransformer(heads=4)
        ),
        "its upscaling is made of ConvTranspose2d, LayerNorm2d, ReLU": lambda: foreign.MaskDecoder(
            activation=nn.ReLU
        ),
        "its upscaling has a GELU": lambda: foreign.MaskDecoder(
            activation=lambda: nn.GELU(approximate="tanh")
        ),
        "its transformer's activation is GELU": set_("transformer.layers.1.mlp.act", nn.GELU()),
        "its predicted IoU goes through a sigmoid": set_(
            "iou_prediction_head.sigmoid_output", True
        ),
        "it has no attribute 'mask_tokens'": lambda: with_(
            lambda decoder: delattr(decoder, "mask_tokens")
        ),
        "its upscaling has a ConvTranspose2d": set_(
            "output_upscaling.3", nn.ConvTranspose2d(64, 32, 2, 2, bias=False)
        ),
        "its weights are not those of SAM's mask decoder": set_("further", nn.Linear(2, 2)),
    }


@pytest.mark.parametrize(("reason", "make"), other_decoders().items(), ids=other_decoders())
def test_other_mask_decoders_are_left(randomised, reason, make):
    fused = ek.fuse(randomised(make()))
    assert type(fused) is foreign.MaskDecoder
    assert reason in fused.fusion_report.left[0].reason


def test_the_fused_model_compiles(randomised):
    """Into one graph, which is that of the plain decoder."""
    decoder = randomised(foreign.MaskDecoder())
    inputs = prompts()
    compiled = torch.compile(ek.fuse(decoder), backend="eager", fullgraph=True)
    with torch.no_grad():
        for ours, want in zip(compiled(*inputs, True), decoder(*inputs, True), strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
