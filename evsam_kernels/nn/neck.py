"""The neck of EfficientViT-SAM: three stages of the backbone merged into SAM's 64x64 embedding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from evsam_kernels.nn.blocks import FusedMBConv, MBConv, OpSequential, ResBlock, ResidualBlock
from evsam_kernels.nn.layers import ConvLayer, IdentityLayer, UpSampleLayer

_MIDDLE_BLOCKS = {"mb": (MBConv, 3), "fmb": (FusedMBConv, 2), "res": (ResBlock, 2)}


class SamNeck(nn.Module):
    """Merge feature maps into the embedding.

    A dict of `[B, C_i, h_i, w_i]` -> the dict with "sam_encoder" `[B, out_dim, 64, 64]`. Every
    input goes through a 1x1 convolution and bicubic resizing to 64x64; their sum goes through
    `head_depth` residual blocks and a 1x1 convolution with bias.

    Args:
        fid_list: keys of the inputs, coarsest first.
        in_channel_list: channels of each input.
        head_width: channels of the merged map.
        head_depth: number of residual blocks.
        expand_ratio: expansion of the residual blocks.
        middle_op: "mb", "fmb" or "res", the kind of the residual blocks.
        out_dim: channels of the embedding.
        norm: normalisation of the blocks.
        act_func: activation of the blocks.

    Raises:
        ValueError: `middle_op` is unknown, or the two lists differ in length.
    """

    def __init__(
        self,
        fid_list: Sequence[str],
        in_channel_list: Sequence[int],
        head_width: int,
        head_depth: int,
        expand_ratio: float,
        middle_op: str,
        out_dim: int = 256,
        norm: str | None = "bn2d",
        act_func: str | None = "gelu",
    ) -> None:
        super().__init__()
        if middle_op not in _MIDDLE_BLOCKS:
            raise ValueError(
                f"middle_op must be one of {', '.join(map(repr, _MIDDLE_BLOCKS))}, "
                f"got {middle_op!r}"
            )
        if len(fid_list) != len(in_channel_list):
            raise ValueError(
                f"in_channel_list must have one entry per entry of fid_list ({len(fid_list)}), "
                f"got {len(in_channel_list)}"
            )
        block, convs = _MIDDLE_BLOCKS[middle_op]
        self.input_keys = list(fid_list)
        self.input_ops = nn.ModuleList(
            OpSequential(
                [
                    ConvLayer(in_channels, head_width, 1, norm=norm, act_func=None),
                    UpSampleLayer(size=(64, 64)),
                ]
            )
            for in_channels in in_channel_list
        )
        self.middle = OpSequential(
            [
                ResidualBlock(
                    block(
                        head_width,
                        head_width,
                        expand_ratio=expand_ratio,
                        norm=norm,
                        act_func=(*[act_func] * (convs - 1), None),
                    ),
                    IdentityLayer(),
                )
                for _ in range(head_depth)
            ]
        )
        self.output_keys = ["sam_encoder"]
        self.output_ops = nn.ModuleList(
            [
                OpSequential(
                    [ConvLayer(head_width, out_dim, 1, use_bias=True, norm=None, act_func=None)]
                )
            ]
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = [op(features[key]) for key, op in zip(self.input_keys, self.input_ops, strict=True)]
        x = self.middle(sum(maps[1:], maps[0]))
        outputs = zip(self.output_keys, self.output_ops, strict=True)
        return {**features, **{key: op(x) for key, op in outputs}}
