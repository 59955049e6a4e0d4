"""Trainable drop-ins for the modules of EfficientViT-SAM: same arguments, state and results."""

from evsam_kernels.nn.attention import EfficientViTBlock, LiteMLA
from evsam_kernels.nn.backbone import EfficientViTLargeBackbone
from evsam_kernels.nn.blocks import (
    DSConv,
    FusedMBConv,
    MBConv,
    OpSequential,
    ResBlock,
    ResidualBlock,
)
from evsam_kernels.nn.layers import ConvLayer, IdentityLayer, LayerNorm2d, UpSampleLayer
from evsam_kernels.nn.neck import SamNeck

__all__ = [
    "ConvLayer",
    "DSConv",
    "EfficientViTBlock",
    "EfficientViTLargeBackbone",
    "FusedMBConv",
    "IdentityLayer",
    "LayerNorm2d",
    "LiteMLA",
    "MBConv",
    "OpSequential",
    "ResBlock",
    "ResidualBlock",
    "SamNeck",
    "UpSampleLayer",
]
