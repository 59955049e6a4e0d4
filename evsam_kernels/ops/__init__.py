"""The operations: one folder each, with its public function, its formula and its kernels."""

from evsam_kernels.ops.conv_act.api import conv_act
from evsam_kernels.ops.fused_mbconv.api import fused_mbconv
from evsam_kernels.ops.layer_norm_2d.api import layer_norm_2d
from evsam_kernels.ops.mbconv.api import mbconv
from evsam_kernels.ops.measure_masks.api import measure_masks
from evsam_kernels.ops.multi_scale_attention.api import multi_scale_attention
from evsam_kernels.ops.relu_linear_attention.api import relu_linear_attention
from evsam_kernels.ops.upsample_add.api import upsample_add

__all__ = [
    "conv_act",
    "fused_mbconv",
    "layer_norm_2d",
    "mbconv",
    "measure_masks",
    "multi_scale_attention",
    "relu_linear_attention",
    "upsample_add",
]
