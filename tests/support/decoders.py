"""Mask decoders and prompts, and the errors that a decoder may make."""

from __future__ import annotations

import copy

import torch

from evsam_kernels.numerics.budget import budget, measure
from evsam_kernels.sam.mask_decoder import MaskDecoder, TwoWayTransformer


def plain_decoder(seed: int = 0) -> MaskDecoder:
    """A decoder whose norms and biases are not at their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = MaskDecoder(transformer=TwoWayTransformer()).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return decoder


def prompts(points=2, batch=20, size=(9, 11), dtype=torch.float32, scale=1.0, seed=0):
    """Image, encoding, tokens and the dense map of prompts without a mask.

    So many that the errors of a few numbers do not decide.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    dense = normal(1, 256, 1, 1).to(dtype).expand(batch, -1, *size)
    image, pe = scale * normal(1, 256, *size), normal(1, 256, *size)
    return image.to(dtype), pe.to(dtype), normal(batch, points, 256).to(dtype), dense


def exactly(decoder, inputs, multimask):
    """The plain decoder's masks and IoU in float64."""
    image, pe, tokens, dense = (x.double() for x in inputs)
    return copy.deepcopy(decoder).double()(image, pe, tokens, dense, multimask)


def assert_close(ours, plain, exact, dtype=torch.float32):
    for mine, same_dtype, want in zip(ours, plain, exact, strict=True):
        assert mine.shape == want.shape
        assert want.norm() > 0 and torch.isfinite(mine).all()
        allowed = budget(measure(same_dtype, want), dtype)
        assert measure(mine, want).within(allowed), (allowed, measure(mine, want))
