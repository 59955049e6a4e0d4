"""Fused kernels and drop-in modules for EfficientViT-SAM, each checked against a reference."""

from evsam_kernels import nn, ops, simt
from evsam_kernels.backends import BackendUnavailableError
from evsam_kernels.fusion import FusionReport, fuse
from evsam_kernels.sam import (
    CheckpointError,
    EfficientViTSam,
    EfficientViTSamAutomaticMaskGenerator,
    EfficientViTSamPredictor,
    create_efficientvit_sam_model,
    create_sam_model,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "EfficientViTSam",
    "EfficientViTSamAutomaticMaskGenerator",
    "EfficientViTSamPredictor",
    "FusionReport",
    "create_efficientvit_sam_model",
    "create_sam_model",
    "fuse",
    "nn",
    "ops",
    "simt",
]
