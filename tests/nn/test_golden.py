"""Every drop-in module against figures of the authors' package: results, gradients, statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evsam_kernels.nn import (
    ConvLayer,
    DSConv,
    EfficientViTBlock,
    FusedMBConv,
    LayerNorm2d,
    LiteMLA,
    MBConv,
    ResBlock,
    UpSampleLayer,
)
from evsam_kernels.sam.synthetic import load_synthetic_weights

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "modules.npz")

FEWER_NORM = {"use_bias": (True, True, False), "norm": (None, None, "bn2d")}
CASES: dict[str, Callable[[], nn.Module]] = {
    "conv_layer_s2_gelu": lambda: ConvLayer(3, 16, 3, 2, norm="bn2d", act_func="gelu"),
    "dsconv_hswish": lambda: DSConv(16, 24, 3, 1, norm="bn2d", act_func=("hswish", None)),
    "mbconv_s1_gelu": lambda: MBConv(
        16, 16, 3, 1, expand_ratio=4, act_func=("gelu", "gelu", None), **FEWER_NORM
    ),
    "mbconv_s2_gelu": lambda: MBConv(
        16, 32, 3, 2, expand_ratio=16, act_func=("gelu", "gelu", None), **FEWER_NORM
    ),
    "mbconv_s1_bn_hswish": lambda: MBConv(
        16, 16, 3, 1, expand_ratio=4, norm="bn2d", act_func=("hswish", "hswish", None)
    ),
    "fused_mbconv_s1_gelu": lambda: FusedMBConv(
        16, 16, 3, 1, expand_ratio=4, norm="bn2d", act_func=("gelu", None)
    ),
    "fused_mbconv_s2_gelu": lambda: FusedMBConv(
        16, 32, 3, 2, expand_ratio=16, norm="bn2d", act_func=("gelu", None)
    ),
    "fused_mbconv_e1_gelu": lambda: FusedMBConv(
        32, 32, 3, 1, expand_ratio=1, norm="bn2d", act_func=("gelu", None)
    ),
    "res_block_gelu": lambda: ResBlock(
        16, 16, 3, 1, expand_ratio=1, norm="bn2d", act_func=("gelu", None)
    ),
    "lite_mla_scale5": lambda: LiteMLA(64, 64, dim=32, norm=(None, "bn2d"), scales=(5,)),
    "lite_mla_scale3": lambda: LiteMLA(64, 64, dim=32, norm=(None, "bn2d"), scales=(3,)),
    "lite_mla_scales3_5_dim16": lambda: LiteMLA(32, 48, dim=16, scales=(3, 5)),
    "lite_mla_quadratic": lambda: LiteMLA(64, 64, dim=32, norm=(None, "bn2d"), scales=(5,)),
    "efficientvit_block": lambda: EfficientViTBlock(
        64, dim=32, expand_ratio=6, scales=(5,), act_func="gelu"
    ),
    "layer_norm_2d": lambda: LayerNorm2d(32),
    "upsample_bicubic_64": lambda: UpSampleLayer(mode="bicubic", size=(64, 64)),
}

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Relative; the figures themselves are stored in float32."""


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    expected = expected.astype(np.float64)
    norm = np.linalg.norm(expected)
    assert np.isfinite(norm) and norm > 0
    return float(np.linalg.norm(actual.detach().double().numpy() - expected) / norm)


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(dtype)


def build(case: str, dtype: torch.dtype) -> nn.Module:
    module = CASES[case]()
    for submodule in module.modules():
        if isinstance(submodule, (nn.BatchNorm2d, nn.LayerNorm)):
            submodule.eps = 1e-6
    load_synthetic_weights(module, prefix=f"{case}.")
    return module.to(dtype)


def test_every_golden_case_is_tested():
    assert {key.split("/")[0] for key in GOLDEN.files} == set(CASES)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_authors(case, dtype, mode):
    module = build(case, dtype).train(mode == "train")
    x = normal(1234, tuple(GOLDEN[f"{case}/input_shape"]), dtype).requires_grad_()
    y = module(x)
    y.backward(normal(4321, tuple(y.shape), dtype))

    prefix = f"{case}/{mode}"
    checked = {prefix: y, f"{prefix}_grad_input": x.grad}
    for name, parameter in module.named_parameters():
        checked[f"{prefix}_grad/{name}"] = parameter.grad
    if mode == "train":
        for name, buffer in module.named_buffers():
            if not name.endswith("num_batches_tracked"):
                checked[f"{case}/after_train/{name}"] = buffer

    stored = {
        key
        for key in GOLDEN.files
        if key == prefix
        or key.startswith((f"{prefix}_grad", f"{case}/after_train" if mode == "train" else prefix))
    }
    assert set(checked) == stored
    for key, actual in checked.items():
        assert relative_error(actual, GOLDEN[key]) <= TOLERANCE[dtype], key
