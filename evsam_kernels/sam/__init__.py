"""EfficientViT-SAM: the model, its variants and checkpoints, predictor and mask generator."""

from evsam_kernels.sam.checkpoint import CheckpointError
from evsam_kernels.sam.mask_decoder import MaskDecoder, TwoWayTransformer
from evsam_kernels.sam.mask_generator import EfficientViTSamAutomaticMaskGenerator
from evsam_kernels.sam.model import EfficientViTSam, EfficientViTSamImageEncoder
from evsam_kernels.sam.predictor import EfficientViTSamPredictor
from evsam_kernels.sam.prompt_encoder import PromptEncoder
from evsam_kernels.sam.zoo import create_efficientvit_sam_model, create_sam_model

__all__ = [
    "CheckpointError",
    "EfficientViTSam",
    "EfficientViTSamAutomaticMaskGenerator",
    "EfficientViTSamImageEncoder",
    "EfficientViTSamPredictor",
    "MaskDecoder",
    "PromptEncoder",
    "TwoWayTransformer",
    "create_efficientvit_sam_model",
    "create_sam_model",
]
