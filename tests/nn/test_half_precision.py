"""Half precision where the stock formulas overflow: finite, and within the error budget.

The stock formulas are those of the authors' code; each test first shows that they fail.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evsam_kernels as ek
from evsam_kernels.sam.synthetic import load_synthetic_weights

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALVES = pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=["float16", "bfloat16"])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm()
    assert torch.isfinite(norm) and norm > 0
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / norm).item()


def stock_layer_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    y = x - x.mean(dim=1, keepdim=True)
    y = y / torch.sqrt(torch.square(y).mean(dim=1, keepdim=True) + layer.eps)
    return y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def stock_attention(qkv: Tensor, dim: int, eps: float) -> Tensor:
    batch, _, height, width = qkv.shape
    q, k, v = qkv.reshape(batch, -1, 3 * dim, height * width).split(dim, dim=2)
    state = F.pad(v, (0, 0, 0, 1), value=1.0) @ torch.relu(k).transpose(-1, -2)
    out = state @ torch.relu(q)
    return (out[:, :, :-1] / (out[:, :, -1:] + eps)).reshape(batch, -1, height, width)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@HALVES
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_layer_norm_2d(dtype, fused):
    layer = ek.nn.LayerNorm2d(48).eval()
    load_synthetic_weights(layer)
    x = normal(2, 48, 9, 7, scale=8000.0).to(dtype)
    half = copy.deepcopy(layer).to(dtype)
    if dtype == torch.float16:
        assert collapses(stock_layer_norm(x, half), layer.double()(x.double()))
    expected = copy.deepcopy(half).double()(x.double())
    y = (ek.fuse(half) if fused else half)(x)
    assert y.dtype == dtype
    assert relative_error(y, expected) <= UNIT_ROUNDOFF[dtype]


def collapses(actual: Tensor, expected: Tensor) -> bool:
    """Whether a result has nothing to do with what it should be."""
    return not actual.isfinite().all() or relative_error(actual, expected) > 0.5


@HALVES
@pytest.mark.parametrize("size", [(16, 16), (4, 5)], ids=["linear", "quadratic"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_lite_mla(dtype, size, fused):
    module = ek.nn.LiteMLA(64, 64, dim=32, norm=(None, "bn2d")).eval()
    load_synthetic_weights(module)
    half = module.to(dtype)
    x = normal(2, 64, *size, scale=2000.0).to(dtype)
    expected = copy.deepcopy(half).double()(x.double())
    with torch.no_grad():
        if dtype == torch.float16:
            qkv = half.qkv(x)
            assert qkv.isfinite().all()
            assert not stock_attention(qkv, half.dim, half.eps).isfinite().all()
        plain = half if not fused else ek.fuse(half)
        y = plain(x)
    assert y.dtype == dtype
    # Unfused, every convolution and the attention round to the storage dtype: six roundings
    # between input and output. Fused, only the output is rounded.
    roundings = 1 if fused else 6
    assert relative_error(y, expected) <= 2 * roundings * UNIT_ROUNDOFF[dtype]


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """The L0 encoder, with activations that overflow the stock formulas in float16."""
    model = ek.create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False)
    load_synthetic_weights(model)
    encoder = model.image_encoder
    with torch.no_grad():
        for block in encoder.backbone.stages[4].op_list[1:]:
            # q and k in the thousands; attention does not depend on their scale.
            qkv = block.context_module.main.qkv.conv.weight
            qkv.view(-1, 3, 32, qkv.shape[1])[:, :2].mul_(2000)
        # The input of the last LayerNorm in the thousands.
        encoder.neck.output_ops[0].op_list[0].conv.weight.mul_(1000)
    return encoder


IMAGE = normal(1, 3, 128, 128)


def test_the_encoder_s_activations_overflow_the_stock_formulas(encoder):
    seen: dict[str, Tensor] = {}
    attention = encoder.backbone.stages[4].op_list[1].context_module.main
    hooks = [
        attention.qkv.register_forward_hook(lambda m, args, out: seen.update(qkv=out)),
        encoder.norm.register_forward_pre_hook(lambda m, args: seen.update(norm=args[0])),
    ]
    with torch.no_grad():
        encoder(IMAGE)
    for hook in hooks:
        hook.remove()
    qkv, norm = seen["qkv"].half(), seen["norm"].half()
    assert qkv.isfinite().all() and norm.isfinite().all()
    assert not stock_attention(qkv, attention.dim, attention.eps).isfinite().all()
    layer = copy.deepcopy(encoder.norm).half()
    assert collapses(stock_layer_norm(norm, layer), encoder.norm(seen["norm"]))


@pytest.fixture(scope="module")
def expected(encoder) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(encoder).double()(IMAGE.double())


@pytest.fixture(scope="module")
def rounding_of_the_model(encoder, expected) -> dict[torch.dtype, float]:
    """What rounding the weights and the image alone costs, all else in float32."""
    with torch.no_grad():
        return {
            dtype: relative_error(
                copy.deepcopy(encoder).to(dtype).float()(IMAGE.to(dtype).float()), expected
            )
            for dtype in UNIT_ROUNDOFF
        }


@HALVES
@pytest.mark.parametrize("way", ["fused", "fused_autocast", "unfused", "autocast"])
def test_whole_encoder(encoder, expected, rounding_of_the_model, dtype, way):
    with torch.no_grad():
        if way.startswith("fused"):
            module, x = ek.fuse(encoder, dtype=dtype), IMAGE
        elif way == "unfused":
            # PyTorch's float16 convolutions on the CPU are many times faster in channels_last.
            module = copy.deepcopy(encoder).to(dtype=dtype, memory_format=torch.channels_last)
            x = IMAGE.to(dtype)
        else:
            module, x = encoder, IMAGE
        with torch.autocast("cpu", dtype=dtype, enabled=way.endswith("autocast")):
            y = module(x)
    assert y.dtype == dtype
    # Storing activations costs about as much again as storing weights and image does.
    assert relative_error(y, expected) <= 2 * rounding_of_the_model[dtype] + UNIT_ROUNDOFF[dtype]


@HALVES
@pytest.mark.parametrize("way", ["fused", "unfused"])
def test_whole_model_predicts(dtype, way):
    model = ek.create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False)
    load_synthetic_weights(model)
    image = (normal(60, 90, 3).sigmoid() * 255).to(torch.uint8).numpy()
    prompt = {"point_coords": [[40.0, 30.0]], "point_labels": [1], "return_logits": True}

    def predict(model: nn.Module) -> tuple[Tensor, Tensor]:
        predictor = ek.EfficientViTSamPredictor(model)
        predictor.set_image(image)
        logits, scores, _ = predictor.predict(**prompt)
        return torch.from_numpy(logits), torch.from_numpy(scores)

    logits, scores = predict(model)
    if way == "fused":
        half = ek.fuse(model, dtype=dtype)
    else:
        half = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    half_logits, half_scores = predict(half)
    # At most four roundings were seen; twice that leaves room for CPUs that sum in another order.
    assert relative_error(half_logits, logits) <= 8 * UNIT_ROUNDOFF[dtype]
    assert relative_error(half_scores, scores) <= 8 * UNIT_ROUNDOFF[dtype]
