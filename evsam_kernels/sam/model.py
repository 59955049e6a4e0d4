"""EfficientViT-SAM: image encoder, prompt encoder and mask decoder in one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evsam_kernels.nn import LayerNorm2d, SamNeck
from evsam_kernels.sam.mask_decoder import MaskDecoder
from evsam_kernels.sam.preprocess import SamTransform, Size, postprocess_masks
from evsam_kernels.sam.prompt_encoder import PromptEncoder


class EfficientViTSamImageEncoder(nn.Module):
    """Backbone, neck and LayerNorm: `[B, 3, S, S]` -> `[B, 256, 64, 64]`."""

    def __init__(self, backbone: nn.Module, neck: SamNeck) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.norm = LayerNorm2d(256)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.neck(self.backbone(x))["sam_encoder"])


class EfficientViTSam(nn.Module):
    """The whole model (arXiv 2402.05008).

    Args:
        image_encoder: `[B, 3, S, S]` -> `[B, 256, 64, 64]`.
        prompt_encoder: SAM's prompt encoder.
        mask_decoder: SAM's mask decoder.
        image_size: side of the frame in which prompts are given (1024 for every variant) and side S
            of the encoder's input, in pixels.
    """

    mask_threshold: float = 0.0
    image_format: str = "RGB"

    def __init__(
        self,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        image_size: tuple[int, int] = (1024, 512),
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.image_size = image_size
        self.transform = SamTransform(image_size[1])

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.prompt_encoder.no_mask_embed.weight.device

    def postprocess_masks(self, masks: Tensor, input_size: Size, original_size: Size) -> Tensor:
        """Low-resolution logits `[B, M, h, w]` -> float32 logits `[B, M, *original_size]`."""
        return postprocess_masks(masks, input_size, original_size, self.image_size[0])

    def forward(
        self, batched_input: list[dict[str, Any]], multimask_output: bool
    ) -> tuple[Tensor, Tensor]:
        """Segment a batch of images, each with the same number of prompts.

        Args:
            batched_input: per image a dict with "image" `[3, S, S]`, preprocessed, and any of
                "point_coords" `[P, N, 2]` with "point_labels" `[P, N]`, "boxes" `[P, 4]` and
                "mask_inputs" `[P, 1, 256, 256]`, coordinates in the prompt frame.
            multimask_output: three masks per prompt rather than one.

        Returns:
            Logits `[B, P, M, 256, 256]` and predicted IoU `[B, P, M]`.
        """
        embeddings = self.image_encoder(torch.stack([record["image"] for record in batched_input]))
        logits, scores = [], []
        for record, embedding in zip(batched_input, embeddings, strict=True):
            points = None
            if "point_coords" in record:
                points = (record["point_coords"], record["point_labels"])
            sparse, dense = self.prompt_encoder(
                points=points, boxes=record.get("boxes"), masks=record.get("mask_inputs")
            )
            low_res, iou = self.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
            )
            logits.append(low_res)
            scores.append(iou)
        return torch.stack(logits), torch.stack(scores)
