"""SAM's prompt encoder: points, boxes and masks become tokens and a dense map for the decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evsam_kernels.nn import LayerNorm2d
from evsam_kernels.ops.layout import accumulation_dtype

_NOT_A_POINT = -1


class RandomFourierFeatures(nn.Module):
    """Positions in the unit square as sines and cosines of random frequencies (arXiv 2006.10739).

    Computed in float32 (float64 for a float64 module): half precision cannot hold a phase.
    """

    def __init__(self, num_frequencies: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, num_frequencies))
        self.positional_encoding_gaussian_matrix: Tensor

    def forward(self, positions: Tensor) -> Tensor:
        """`[..., 2]` as (x, y) in [0, 1] -> `[..., 2 * num_frequencies]`, dtype of the module."""
        frequencies = self.positional_encoding_gaussian_matrix
        wide = accumulation_dtype(frequencies.dtype)
        with torch.autocast(device_type=frequencies.device.type, enabled=False):
            phases = 2 * math.pi * ((2 * positions.to(wide) - 1) @ frequencies.to(wide))
        return torch.cat([phases.sin(), phases.cos()], dim=-1).to(frequencies.dtype)


class PromptEncoder(nn.Module):
    """Encodes prompts given in pixels of the input frame.

    Section A of "Segment Anything" (arXiv 2304.02643); names of the state as there.

    Args:
        embed_dim: channels of tokens and map.
        image_embedding_size: (height, width) of the image embedding.
        input_image_size: (height, width) of the frame in which coordinates are given, in pixels.
        mask_in_chans: hidden channels of the mask branch.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        image_embedding_size: tuple[int, int] = (64, 64),
        input_image_size: tuple[int, int] = (1024, 1024),
        mask_in_chans: int = 16,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])
        self.pe_layer = RandomFourierFeatures(embed_dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the image embedding's pixel centres: `[1, embed_dim, h, w]`."""
        height, width = self.image_embedding_size
        device = self.no_mask_embed.weight.device
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        positions = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        return self.pe_layer(positions).permute(2, 0, 1)[None]

    def _encode_positions(self, coords: Tensor) -> Tensor:
        """Pixel coordinates `[B, N, 2]` as (x, y) -> `[B, N, embed_dim]`."""
        height, width = self.input_image_size
        wide = accumulation_dtype(self.no_mask_embed.weight.dtype)
        frame = torch.tensor([width, height], dtype=wide, device=coords.device)
        return self.pe_layer((coords.to(wide) + 0.5) / frame)

    def _point_embedding(self, kind: int) -> Tensor:
        """`[1, embed_dim]`: background point, foreground point, top left, bottom right corner."""
        return self.point_embeddings[kind].get_parameter("weight")

    def _embed_points(self, coords: Tensor, labels: Tensor, pad: bool) -> Tensor:
        """Points `[B, N, 2]` and labels `[B, N]` -> `[B, N (+ 1), embed_dim]`."""
        if pad:  # SAM was trained with one token that is no point wherever there is no box.
            coords = torch.cat([coords, coords.new_zeros(coords.shape[0], 1, 2)], dim=1)
            labels = torch.cat([labels, labels.new_full((labels.shape[0], 1), _NOT_A_POINT)], dim=1)
        labels = labels[..., None]
        background, foreground = self._point_embedding(0), self._point_embedding(1)
        tokens = self._encode_positions(coords)
        tokens = torch.where(labels == _NOT_A_POINT, self.not_a_point_embed.weight, tokens)
        tokens = torch.where(labels == 0, tokens + background, tokens)
        return torch.where(labels == 1, tokens + foreground, tokens)

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes `[B, 4]` as (x0, y0, x1, y1) -> `[B, 2, embed_dim]`."""
        corners = torch.cat([self._point_embedding(2), self._point_embedding(3)])
        return self._encode_positions(boxes.reshape(-1, 2, 2)) + corners

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode a batch of prompts.

        Args:
            points: coordinates `[B, N, 2]` as (x, y) in pixels of the frame, and labels `[B, N]`:
                1 foreground, 0 background, -1 no point.
            boxes: `[B, 4]` as (x0, y0, x1, y1) in pixels of the frame.
            masks: logits `[B, 1, 4 h, 4 w]` of an earlier prediction.

        Returns:
            Tokens `[B, N', embed_dim]` and the dense map `[B, embed_dim, h, w]`.
        """
        weight = self.no_mask_embed.weight
        prompts = [prompt for prompt in (points and points[0], boxes, masks) if prompt is not None]
        batch = prompts[0].shape[0] if prompts else 1
        tokens = [weight.new_empty(batch, 0, self.embed_dim)]
        if points is not None:
            tokens.append(self._embed_points(*points, pad=boxes is None))
        if boxes is not None:
            tokens.append(self._embed_boxes(boxes))
        if masks is None:
            dense = weight.view(1, -1, 1, 1).expand(batch, -1, *self.image_embedding_size)
        else:
            dense = self.mask_downscaling(masks.to(weight.dtype))
        return torch.cat(tokens, dim=1), dense
