"""The large EfficientViT backbone: a convolutional stem and stages of ever stronger blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from evsam_kernels.nn.attention import EfficientViTBlock
from evsam_kernels.nn.blocks import FusedMBConv, MBConv, OpSequential, ResBlock, ResidualBlock
from evsam_kernels.nn.layers import ConvLayer, IdentityLayer

_ATTENTION_SCALES = {"att": (5,), "att@3": (3,)}


def _local_block(
    kind: str,
    in_channels: int,
    out_channels: int,
    stride: int,
    expand_ratio: float,
    norm: str | None,
    act_func: str | None,
    fewer_norm: bool,
) -> nn.Module:
    """A convolution block; with `fewer_norm`, bias on every conv but the last, norm on the last."""
    block, convs = {"res": (ResBlock, 2), "fmb": (FusedMBConv, 2), "mb": (MBConv, 3)}[kind]
    return block(
        in_channels,
        out_channels,
        stride=stride,
        expand_ratio=expand_ratio,
        use_bias=(*[True] * (convs - 1), False) if fewer_norm else False,
        norm=(*[None] * (convs - 1), norm) if fewer_norm else norm,
        act_func=(*[act_func] * (convs - 1), None),
    )


class EfficientViTLargeBackbone(nn.Module):
    """Feature maps of every stage: `[B, in_channels, H, W]` -> dict of `[B, width, H', W']`.

    The dict has keys "input", "stage0", ... and "stage_final"; every stage halves height and width.
    Stage 0 is a strided convolution, every later stage begins with a strided block; then come
    `depth_list[i]` residual blocks.

    Args:
        width_list: channels of every stage.
        depth_list: residual blocks of every stage.
        block_list: "res", "fmb", "mb", "att" (scale 5) or "att@3" (scale 3) per stage.
        expand_list: expansion of a stage's residual blocks; its strided block has four times that.
        fewer_norm_list: whether a stage's blocks normalise only their last convolution.
        in_channels: channels of the image.
        qkv_dim: channels of one attention head's q.
        norm: normalisation of the blocks.
        act_func: activation of the blocks.

    Raises:
        ValueError: an unknown block, or lists of different lengths.
    """

    def __init__(
        self,
        width_list: Sequence[int],
        depth_list: Sequence[int],
        block_list: Sequence[str] | None = None,
        expand_list: Sequence[float] | None = None,
        fewer_norm_list: Sequence[bool] | None = None,
        in_channels: int = 3,
        qkv_dim: int = 32,
        norm: str | None = "bn2d",
        act_func: str | None = "gelu",
    ) -> None:
        super().__init__()
        block_list = block_list or ["res", "fmb", "fmb", "mb", "att"]
        expand_list = expand_list or [1, 4, 4, 4, 6]
        fewer_norm_list = fewer_norm_list or [False, False, False, True, True]
        stages = len(width_list)
        for name, values in (
            ("depth_list", depth_list),
            ("block_list", block_list),
            ("expand_list", expand_list),
            ("fewer_norm_list", fewer_norm_list),
        ):
            if len(values) != stages:
                raise ValueError(
                    f"{name} must have one entry per stage ({stages}, as width_list has), "
                    f"got {len(values)}"
                )
        known = ("res", "fmb", "mb", *_ATTENTION_SCALES)
        if unknown := [kind for kind in block_list if kind not in known]:
            raise ValueError(
                f"block_list must hold {', '.join(map(repr, known))}, got {unknown[0]!r}"
            )

        self.width_list = list(width_list)
        self.stages = nn.ModuleList()
        for index, (width, depth, kind, expand_ratio, fewer_norm) in enumerate(
            zip(width_list, depth_list, block_list, expand_list, fewer_norm_list, strict=True)
        ):
            previous = in_channels if index == 0 else width_list[index - 1]
            stage: list[nn.Module] = []
            if index == 0:
                stage.append(ConvLayer(previous, width, stride=2, norm=norm, act_func=act_func))
            else:
                downsampling = kind if kind in ("mb", "fmb") else "mb"
                block = _local_block(
                    downsampling, previous, width, 2, expand_ratio * 4, norm, act_func, fewer_norm
                )
                stage.append(ResidualBlock(block, None))
            for _ in range(depth):
                if kind in _ATTENTION_SCALES:
                    stage.append(
                        EfficientViTBlock(
                            width,
                            dim=qkv_dim,
                            expand_ratio=expand_ratio,
                            scales=_ATTENTION_SCALES[kind],
                            norm=norm,
                            act_func=act_func,
                        )
                    )
                else:
                    block = _local_block(
                        kind, width, width, 1, expand_ratio, norm, act_func, fewer_norm
                    )
                    stage.append(ResidualBlock(block, IdentityLayer()))
            self.stages.append(OpSequential(stage))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {"input": x}
        for index, stage in enumerate(self.stages):
            features[f"stage{index}"] = x = stage(x)
        features["stage_final"] = x
        return features
