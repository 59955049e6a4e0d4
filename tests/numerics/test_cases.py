"""The cases: reproducible, representable, and as varied as they are meant to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evsam_kernels.numerics.budget import call, expect, named_tensors
from evsam_kernels.numerics.cases import CASES, INPUT_KINDS, Case, map_operands
from evsam_kernels.numerics.validation import DTYPES
from evsam_kernels.ops.conv_act.reference import ACTIVATIONS
from evsam_kernels.ops.registry import OPERATIONS

ALL = [case for cases in CASES.values() for case in cases]
QUICK = [case for case in ALL if case.quick]


def case_id(case: Case) -> str:
    return f"{case.op}-{case.name}"


def quick_operands(op: str):
    return [case.operands(torch.float32) for case in CASES[op] if case.quick]


def test_every_operation_has_cases_of_every_kind_under_names_of_their_own():
    assert tuple(CASES) == OPERATIONS
    for op, cases in CASES.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert set(INPUT_KINDS) <= set(names)
        assert all(case.op == op for case in cases)
        assert not all(case.quick for case in cases)


@pytest.mark.parametrize("case", QUICK, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_are_finite_reproducible_and_of_the_dtype(case, dtype):
    operands = case.operands(DTYPES[dtype])
    again = named_tensors(case.operands(DTYPES[dtype]))
    for name, tensor in named_tensors(operands).items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, again[name]), name
        assert tensor.dtype == (
            torch.float32 if "float32" in case.name and name != "x" else DTYPES[dtype]
        )


def test_names_decide_on_the_values():
    one, other = (Case("upsample_add", name, {}).operands(torch.float32) for name in "ab")
    assert not torch.equal(one["maps"][0], other["maps"][0])


def test_maps_are_channels_last():
    for case in QUICK:
        first = next(iter(named_tensors(case.operands(torch.float16)).values()))
        assert first.is_contiguous(memory_format=torch.channels_last), case_id(case)


def test_operands_go_to_a_device():
    operands = Case("mbconv", "device", {"residual": True}).operands(torch.float16, "meta")
    assert {tensor.device.type for tensor in named_tensors(operands).values()} == {"meta"}


def test_map_operands_reaches_lists_and_leaves_the_rest():
    operands = {"x": torch.ones(1), "maps": [torch.ones(1)], "eps": 0.5, "bias": None}
    doubled = map_operands(lambda tensor: 2 * tensor, operands)
    assert (doubled["x"], doubled["maps"][0]) == (2, 2)
    assert (doubled["eps"], doubled["bias"]) == (0.5, None)


@pytest.mark.parametrize("op", OPERATIONS)
def test_float16_overflows_on_the_way_and_not_in_the_result(op):
    yardsticks = {}
    for case in CASES[op]:
        if case.quick:
            expected = expect(op, case.operands(torch.float16))["output"]
            assert expected.oracle.half().isfinite().all(), case.name
            yardsticks[case.name] = expected.yardstick
    assert "float32 rounded to float16" in yardsticks.values()
    assert yardsticks["random"] == "float16"


@pytest.mark.parametrize("op", ["conv_act", "fused_mbconv", "mbconv"])
def test_convolutions_of_all_kinds(op):
    found = quick_operands(op)
    assert {operands["activation"] for operands in found} == {None, *ACTIVATIONS}
    assert {operands["stride"] for operands in found} >= {1, 2, 3}
    assert {operands["residual"] is None for operands in found} == {True, False}
    weight = {"conv_act": "weight", "fused_mbconv": "spatial_weight", "mbconv": "depth_weight"}[op]
    assert {operands[weight].shape[-1] for operands in found} >= {1, 3, 5, 7}
    for bias in [name for name in found[0] if name.endswith("bias")]:
        assert {operands[bias] is None for operands in found} == {True, False}, bias
    shapes = [operands["x"].shape for operands in found]
    assert any(shape[2:] == (1, 1) for shape in shapes)
    assert any(shape[1] % 8 for shape in shapes)
    assert any(
        shape[2] % 2 and operands["stride"] == 2
        for shape, operands in zip(shapes, found, strict=True)
    )
    assert any(
        not shape[2] % 2 and operands["stride"] == 2
        for shape, operands in zip(shapes, found, strict=True)
    )


def test_convolutions_with_groups_and_dilation():
    found = quick_operands("conv_act")
    assert any(operands["dilation"] > 1 for operands in found)
    assert any(1 < operands["groups"] < operands["x"].shape[1] for operands in found)
    assert any(operands["groups"] == operands["x"].shape[1] > 1 for operands in found)


def heads_of(qkv: Tensor, head_dim: int) -> Tensor:
    batch, _, height, width = qkv.shape
    return qkv.reshape(batch, -1, 3 * head_dim, height * width)


def test_attention_with_few_and_many_tokens_silent_keys_and_queries():
    found = quick_operands("relu_linear_attention")
    assert {operands["head_dim"] for operands in found} >= {8, 16, 32, 64}
    tokens = [operands["qkv"].shape[2] * operands["qkv"].shape[3] for operands in found]
    assert {
        (count > operands["head_dim"]) - (count < operands["head_dim"])
        for count, operands in zip(tokens, found, strict=True)
    } == {-1, 0, 1}
    silent_keys = silent_queries = 0
    for operands in found:
        dim = operands["head_dim"]
        heads = heads_of(operands["qkv"], dim)
        some_tokens = heads.shape[-1] > 4
        silent_queries += some_tokens and bool((heads[:, :, :dim] < 0).all(2).any())
        silent_keys += some_tokens and bool((heads[:, :, dim : 2 * dim] < 0).all(3).all(2).any())
    assert silent_keys >= 2
    assert silent_queries >= 2


def test_attention_at_several_scales():
    found = quick_operands("multi_scale_attention")
    scales = {tuple(weight.shape[-1] for weight in operands["depth_weights"]) for operands in found}
    assert scales >= {(3,), (5,), (3, 5), ()}
    assert {operands["head_dim"] for operands in found} >= {8, 16, 32, 64}
    for bias in ("depth_biases", "group_biases"):
        assert {len(operands[bias]) for operands in found} >= {0, 2}


def test_layer_norm_with_a_mean_far_from_the_deviation():
    for dtype in DTYPES.values():
        case = next(c for c in CASES["layer_norm_2d"] if c.name == "mean far above deviation")
        x = case.operands(dtype)["x"].double()
        ratio = (x.mean(dim=1).abs() / x.std(dim=1)).min().item()
        storage = torch.float32 if dtype == torch.float64 else dtype
        assert ratio > 0.05 / torch.finfo(storage).eps
        output = call("layer_norm_2d", case.operands(dtype), "reference")
        assert output.isfinite().all()


def test_layer_norm_of_nearly_constant_pixels():
    case = next(c for c in CASES["layer_norm_2d"] if c.name == "constant")
    x = case.operands(torch.float64)["x"]
    assert 0 < (x.std(dim=1) / x.mean(dim=1).abs()).median() < 1e-4


def test_layers_of_the_models_have_their_channels():
    """Widths of stages and expansions as in table 1 of arXiv 2402.05008 and its code."""

    def shapes(op: str, name: str) -> dict[str, tuple[int, ...]]:
        case = next(case for case in CASES[op] if case.name == name)
        operands = case.operands(torch.float32)
        return {key: tuple(value.shape) for key, value in named_tensors(operands).items()}

    found = shapes("mbconv", "XL0 stage 5, strided")
    assert found["expand_weight"] == (24 * 512, 512, 1, 1)
    assert found["point_weight"] == (1024, 24 * 512, 1, 1)
    found = shapes("fused_mbconv", "L0 stage 1, strided")
    assert found["spatial_weight"] == (16 * 32, 32, 3, 3)
    assert found["point_weight"] == (64, 16 * 32, 1, 1)
    found = shapes("multi_scale_attention", "L0 stage 4")
    assert found["qkv_weight"] == (3 * 512, 512, 1, 1)
    assert found["depth_weights[0]"] == (3 * 512, 1, 5, 5)
    assert found["group_weights[0]"] == (3 * 512, 32, 1, 1)
    assert found["proj_weight"] == (512, 2 * 512, 1, 1)
    assert shapes("conv_act", "L0 stem")["weight"] == (32, 3, 3, 3)
    assert shapes("upsample_add", "L0 neck")["maps[0]"] == (1, 256, 16, 16)
