"""The five variants of EfficientViT-SAM by name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from torch import nn

from evsam_kernels.nn import EfficientViTLargeBackbone, SamNeck
from evsam_kernels.sam.checkpoint import load_checkpoint
from evsam_kernels.sam.mask_decoder import MaskDecoder, TwoWayTransformer
from evsam_kernels.sam.model import EfficientViTSam, EfficientViTSamImageEncoder
from evsam_kernels.sam.prompt_encoder import PromptEncoder

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    """What distinguishes one model from another (table 1 of arXiv 2402.05008 and its code).

    Attributes:
        image_size: side of the encoder's input, in pixels.
        widths, depths, blocks, expand, fewer_norm: per stage, see `EfficientViTLargeBackbone`.
        neck_depth: residual blocks of the neck.
        neck_expand: their expansion.
    """

    image_size: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    blocks: tuple[str, ...]
    expand: tuple[int, ...]
    fewer_norm: tuple[bool, ...]
    neck_depth: int
    neck_expand: int


_L0 = Variant(
    image_size=512,
    widths=(32, 64, 128, 256, 512),
    depths=(1, 1, 1, 4, 4),
    blocks=("res", "fmb", "fmb", "mb", "att"),
    expand=(1, 4, 4, 4, 6),
    fewer_norm=(False, False, False, True, True),
    neck_depth=4,
    neck_expand=1,
)
_XL0 = Variant(
    image_size=1024,
    widths=(32, 64, 128, 256, 512, 1024),
    depths=(0, 1, 1, 2, 3, 3),
    blocks=("res", "fmb", "fmb", "fmb", "att@3", "att@3"),
    expand=(1, 4, 4, 4, 4, 6),
    fewer_norm=(False, False, False, False, True, True),
    neck_depth=6,
    neck_expand=4,
)
VARIANTS: dict[str, Variant] = {
    "efficientvit-sam-l0": _L0,
    "efficientvit-sam-l1": replace(_L0, depths=(1, 1, 1, 6, 6), neck_depth=8),
    "efficientvit-sam-l2": replace(_L0, depths=(1, 2, 2, 8, 8), neck_depth=12),
    "efficientvit-sam-xl0": _XL0,
    "efficientvit-sam-xl1": replace(_XL0, depths=(1, 2, 2, 4, 6, 6), neck_depth=12),
}


def build(variant: Variant) -> EfficientViTSam:
    backbone = EfficientViTLargeBackbone(
        variant.widths, variant.depths, variant.blocks, variant.expand, variant.fewer_norm
    )
    stages = len(variant.widths)
    merged = (stages - 1, stages - 2, stages - 3)
    neck = SamNeck(
        fid_list=[f"stage{stage}" for stage in merged],
        in_channel_list=[variant.widths[stage] for stage in merged],
        head_width=256,
        head_depth=variant.neck_depth,
        expand_ratio=variant.neck_expand,
        middle_op="fmb",
    )
    model = EfficientViTSam(
        EfficientViTSamImageEncoder(backbone, neck),
        PromptEncoder(),
        MaskDecoder(transformer=TwoWayTransformer()),
        image_size=(1024, variant.image_size),
    )
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            module.eps = _NORM_EPS
    return model


def create_efficientvit_sam_model(
    name: str = "efficientvit-sam-xl1",
    pretrained: bool = True,
    weight_url: str | os.PathLike[str] | None = None,
) -> EfficientViTSam:
    """Build a variant of EfficientViT-SAM and, if `pretrained`, load its checkpoint.

    Args:
        name: "efficientvit-sam-l0", "-l1", "-l2", "-xl0" or "-xl1".
        pretrained: load weights; without it the model is randomly initialised.
        weight_url: path of the checkpoint, `.pt` (a state dict, bare or under "state_dict") or
            `.safetensors`. Where not given, `efficientvit_sam_<variant>.pt` in
            `assets/checkpoints/efficientvit_sam/`, where the authors' instructions put it. Nothing
            is downloaded.

    Returns:
        The model, on the CPU, in eval mode; call `.train()` to train it.

    Raises:
        ValueError: no variant has that name, or the weights do not belong to the variant.
        FileNotFoundError: there is no such checkpoint.
    """
    if name not in VARIANTS:
        raise ValueError(f"name must be one of {', '.join(map(repr, VARIANTS))}, got {name!r}")
    model = build(VARIANTS[name])
    if pretrained:
        variant = name.removeprefix("efficientvit-sam-")
        default = f"assets/checkpoints/efficientvit_sam/efficientvit_sam_{variant}.pt"
        load_checkpoint(model, default if weight_url is None else weight_url)
    return model.eval()


def create_sam_model(
    name: str, pretrained: bool = True, weight_url: str | os.PathLike[str] | None = None
) -> EfficientViTSam:
    """`create_efficientvit_sam_model` under its older name; "xl1" is "efficientvit-sam-xl1"."""
    prefix = "efficientvit-sam-"
    return create_efficientvit_sam_model(
        name if name.startswith(prefix) else prefix + name, pretrained, weight_url
    )
