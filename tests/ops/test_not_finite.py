"""NaN and infinity in maps reach the elements that they reach in PyTorch: see docs/behaviour.md."""

from __future__ import annotations

import math

import pytest
import torch
from support.operands import BACKENDS
from torch import Tensor

from evsam_kernels import ops
from evsam_kernels.backends import BACKENDS as ALL_BACKENDS
from evsam_kernels.numerics.budget import call, named_tensors
from evsam_kernels.numerics.cases import Case, map_operands
from evsam_kernels.ops.conv_act.reference import ACTIVATIONS

NOT_FINITE = [math.nan, math.inf, -math.inf]
KERNELS = [(op, backend) for op, backend in BACKENDS if backend != "reference"]
SETTINGS = {
    # No map has the size of the result: such a one is added as it is.
    "upsample_add": {"inputs": ((4, 4), (8, 8))},
    "fused_mbconv": {"residual": True},
    "mbconv": {"residual": True},
    "conv_act": {"residual": True},
}


def kinds(values: Tensor) -> Tensor:
    """0 for a finite value, else which of three it is."""
    return values.isnan() * 1 + values.isposinf() * 2 + values.isneginf() * 3


def with_one(operands: dict, name: str, value: float) -> dict:
    """The operands, an element in the middle of the map of that name replaced."""
    chosen = named_tensors(operands)[name]

    def replaced(tensor: Tensor) -> Tensor:
        if tensor is not chosen:
            return tensor
        tensor = tensor.clone()
        tensor[tuple(length // 2 for length in tensor.shape)] = value
        return tensor

    return map_operands(replaced, operands)


@pytest.mark.parametrize(("op", "backend"), KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_reaches_what_it_reaches_in_pytorch(op, backend, dtype, value):
    operands = Case(op, "one", SETTINGS.get(op, {})).operands(dtype)
    maps = [
        name
        for name in named_tensors(operands)
        if name in ("x", "qkv", "residual") or name.startswith("maps")
    ]
    for name in maps:
        given = with_one(operands, name, value)
        expected = kinds(call(op, given, "reference"))
        # Where it is no NaN, attention's relu may take it away.
        assert not expected.all() and (expected.any() or op == "relu_linear_attention")
        assert torch.equal(kinds(call(op, given, backend)), expected), name


@pytest.mark.skipif(
    ALL_BACKENDS["cpu"].why_unavailable() is not None, reason="the C++ kernels were not built"
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_on_the_cpu(activation):
    values = torch.tensor([*NOT_FINITE, 1e20, -1e20, -1e4])
    x, weight = values.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1)
    found = ops.conv_act(x, weight, activation=activation, backend="cpu").flatten()
    expected = ACTIVATIONS[activation](values)
    if activation in ("silu", "gelu"):
        assert expected[2].isnan()
        expected[2] = -math.inf
    assert torch.equal(kinds(found), kinds(expected))
    finite = expected.isfinite()
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-6, atol=1e-17)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", [7, 8, 9, 10])
def test_reaches_few_pixels_more_in_tiles(value, place):
    x, weight = torch.ones(1, 64, 24, 24), torch.ones(64, 64, 3, 3)
    x[0, 3, place, place] = value
    found, expected = (
        ~ops.conv_act(x, weight, backend=backend).isfinite() for backend in ("auto", "reference")
    )
    assert found[expected].all()
    near = torch.nn.functional.max_pool2d(expected.float(), 5, stride=1, padding=2).bool()
    assert not found[~near].any()


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", [0, 7, 8])
def test_reaches_few_pixels_more_in_pairs(value, place):
    x = torch.ones(2, 128, 16, 16)
    x[1, 3, place, place] = value
    weights = torch.ones(256, 128, 1, 1), torch.ones(256, 1, 3, 3), torch.ones(128, 256, 1, 1)
    expand, depth, point = weights
    found, expected = (
        ~ops.mbconv(x, expand, None, depth, None, point, backend=backend).isfinite()
        for backend in ("auto", "reference")
    )
    assert found[expected].all()
    near = torch.nn.functional.max_pool2d(expected.float(), 5, stride=1, padding=2).bool()
    assert not found[~near].any()


@pytest.mark.parametrize("backend", [b for op, b in KERNELS if op == "upsample_add"])
def test_a_map_of_the_size_of_the_result_is_added_as_it_is(backend):
    maps = torch.zeros(1, 2, 6, 6)
    maps[0, 1, 3, 3] = math.nan
    found = ops.upsample_add([maps], (6, 6), backend=backend)
    assert torch.equal(found.isnan(), maps.isnan())


HUGE = 2**17


@pytest.mark.parametrize("op", ["conv_act", "layer_norm_2d"])
def test_shapes_of_more_elements_than_int32_counts(op):
    """Traced, as no memory holds them here: `meta` tensors have a shape and no values."""
    x = torch.empty(1, 4, HUGE, HUGE, device="meta")
    assert x.numel() > 2**31
    if op == "conv_act":
        result = ops.conv_act(x, torch.empty(3, 4, 3, 3, device="meta"), stride=2)
        assert result.shape == (1, 3, HUGE // 2, HUGE // 2)
    else:
        result = ops.layer_norm_2d(x)
        assert result.shape == x.shape
    assert result.stride(0) == result.numel()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_more_than_memory_holds_is_pytorchs_error(backend):
    x = torch.zeros(1, 1, 1, 1).expand(1, 4, 2**23, 2**23)
    with pytest.raises(RuntimeError, match=r"memory|allocate"):
        ops.layer_norm_2d(x, backend=backend)
