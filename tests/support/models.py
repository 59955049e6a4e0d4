"""Small models with every kind of block of EfficientViT-SAM, for tests of whole models."""

from __future__ import annotations

from evsam_kernels.nn import EfficientViTLargeBackbone, SamNeck
from evsam_kernels.sam.mask_decoder import MaskDecoder, TwoWayTransformer
from evsam_kernels.sam.model import EfficientViTSam, EfficientViTSamImageEncoder
from evsam_kernels.sam.prompt_encoder import PromptEncoder
from evsam_kernels.sam.synthetic import load_synthetic_weights


def small_encoder() -> EfficientViTSamImageEncoder:
    """The stages of L0 and its neck at an eighth of the channels, one block of each kind."""
    backbone = EfficientViTLargeBackbone(
        (8, 8, 16, 32, 64),
        (1, 1, 1, 1, 1),
        ("res", "fmb", "fmb", "mb", "att"),
        (1, 4, 4, 4, 6),
        (False, False, False, True, True),
    )
    neck = SamNeck(["stage4", "stage3", "stage2"], [64, 32, 16], 16, 1, 1, "fmb")
    encoder = EfficientViTSamImageEncoder(backbone, neck).eval()
    load_synthetic_weights(encoder)
    return encoder


def small_model() -> EfficientViTSam:
    """The small encoder with SAM's own prompt encoder and decoder, for pictures of 128 x 128."""
    model = EfficientViTSam(
        small_encoder(), PromptEncoder(), MaskDecoder(transformer=TwoWayTransformer()), (1024, 128)
    ).eval()
    load_synthetic_weights(model)
    return model
