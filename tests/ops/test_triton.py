"""The Triton kernels of all operations, run in the executor."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import evsam_kernels as ek
from evsam_kernels import simt
from evsam_kernels.backends import BackendUnavailableError
from evsam_kernels.numerics.budget import assert_within_budget
from evsam_kernels.numerics.cases import CASES, Case
from evsam_kernels.numerics.tf32 import tf32
from evsam_kernels.numerics.validation import Step, validate
from evsam_kernels.ops.registry import OPERATIONS, formula, implementation
from evsam_kernels.ops.tiling import Tile

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("evsam_kernels._simt", reason="the executor was not built")


@pytest.fixture
def full_precision():
    """float32 products as float32, which is what they are held against."""
    with tf32(False):
        yield


# float16 has the least range and goes through every case, the others through the quick ones.
STEPS = [
    Step(case, dtype, ("triton",))
    for op in OPERATIONS
    for case in CASES[op]
    for dtype in ("float16", "bfloat16", "float32")
    if dtype == "float16" or case.quick
]


@pytest.mark.parametrize(
    "step", STEPS, ids=lambda step: f"{step.case.op}-{step.case.name}-{step.dtype}"
)
def test_case(step, full_precision):
    with simt.emulate() as emulation:
        (rows,) = validate([step])
    failed = [str(row) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)
    assert emulation.launches, "nothing ran in the executor"


LONG_SUMS = [
    ("conv_act", {"channels": (1500, 24), "size": (4, 5), "kernel": 1}),
    ("mbconv", {"channels": (40, 1100, 24), "size": (4, 5)}),
    ("multi_scale_attention", {"channels": (900, 40), "size": (4, 6), "residual": False}),
]


@pytest.mark.parametrize(("op", "settings"), LONG_SUMS, ids=[op for op, _ in LONG_SUMS])
def test_long_sums_at_full_precision(op, settings, full_precision):
    with simt.emulate():
        assert_within_budget(op, Case(op, "long sums", settings).operands(torch.float32), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"channels": (200, 40), "size": (7, 9), "kernel": 1}, 3 * 2),
        ({"channels": (40, 24), "size": (12, 10), "stride": 2, "residual": True}, 2),
        ({"channels": (3, 24), "size": (7, 9), "activation": "gelu"}, 3),
    ],
    ids=["1x1", "many taps", "all taps at once"],
)
def test_tiles_whose_rows_are_no_power_of_two(settings, blocks, dtype, full_precision, monkeypatch):
    kernels = importlib.import_module("evsam_kernels.ops.conv_act.triton")
    monkeypatch.setattr(kernels, "choose", lambda *_: Tile(48, 32, 32, 4, 3))
    operands = Case("conv_act", "rows", settings).operands(dtype)
    with simt.emulate() as emulation:
        assert_within_budget("conv_act", operands, "triton")
    assert emulation.launches[0].report.grid == (blocks, 1, 1)


@pytest.mark.parametrize("op", ["conv_act", "fused_mbconv", "relu_linear_attention"])
def test_tf32_is_pytorchs_setting(op):
    operands = next(case for case in CASES[op] if case.name == "random").operands(torch.float32)
    oracle = formula(op)(
        **{
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in operands.items()
        }
    )

    def error(allowed: bool) -> float:
        with tf32(allowed), simt.emulate():
            result = getattr(ek.ops, op)(**operands, backend="triton")
        return ((result.double() - oracle).norm() / oracle.norm()).item()

    # Both factors of a product lose what is beyond 10 bits of mantissa.
    assert error(False) < 1e-6
    assert 1e-5 < error(True) < 2 * 2**-10


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_images_do_not_depend_on_their_batch(batch, full_precision):
    x = torch.randn(3, 32, 9, 7, dtype=torch.float16)
    weights = [torch.randn(48, 32, 3, 3) / 17, None, torch.randn(24, 48, 1, 1) / 7]
    weights = [None if weight is None else weight.half() for weight in weights]
    with simt.emulate():
        whole = ek.ops.fused_mbconv(x, *weights, activation="gelu", backend="triton")
        part = ek.ops.fused_mbconv(x[:batch], *weights, activation="gelu", backend="triton")
    assert torch.equal(part, whole[:batch])
    assert part.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", OPERATIONS)
def test_empty_batch(op):
    case = next(case for case in CASES[op] if case.name == "random")
    operands = Case(op, "empty", {**case.settings, "batch": 0}).operands(torch.float16)
    with simt.emulate() as emulation:
        arguments = dict(operands)
        if op == "upsample_add":
            arguments["size"] = (arguments.pop("height"), arguments.pop("width"))
        result = getattr(ek.ops, op)(**arguments, backend="triton")
    assert result.shape[0] == 0
    assert not emulation.launches


def test_attention_over_many_tokens_is_split_and_the_same_every_time(full_precision):
    qkv = torch.randn(1, 48, 40, 32)
    with simt.emulate() as emulation:
        first = ek.ops.relu_linear_attention(qkv, head_dim=16, backend="triton")
        second = ek.ops.relu_linear_attention(qkv, head_dim=16, backend="triton")
        assert_within_budget(
            "relu_linear_attention",
            {"qkv": qkv, "head_dim": 16, "eps": 1e-15},
            "triton",
            gradients=True,
        )
    assert torch.equal(first, second)
    names = [launch.report.kernel for launch in emulation.launches[:2]]
    assert names == ["state_kernel", "attention_kernel"]
    assert emulation.launches[0].report.grid == (10, 1, 1)  # of 1280 tokens


def test_no_part_of_split_attention_is_empty(full_precision):
    with simt.emulate() as emulation:
        operands = {"qkv": torch.randn(1, 48 * 32, 25, 26), "head_dim": 16, "eps": 1e-15}
        assert_within_budget("relu_linear_attention", operands, "triton")
    # 650 tokens are 11 tiles, of which a part has three: four parts, where five would fit.
    assert [launch.report.grid for launch in emulation.launches] == [(4, 32, 1)] * 2


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({"inputs": ((5, 7),), "size": (10, 14)}, "patch"),
        ({"inputs": ((1, 1), (2, 2), (4, 4)), "size": (4, 4), "channels": 300}, "patch"),
        ({"inputs": ((3, 2), (6, 4)), "size": (6, 4)}, "patch"),
        ({"inputs": ((5, 7),), "size": (10, 28)}, "any"),
        ({"inputs": ((2, 3),), "size": (16, 24)}, "any"),
        ({"inputs": ((3, 2), *[(4, 4)] * 4), "size": (8, 8)}, "any patch"),
    ],
    ids=str,
)
def test_resizing_by_patches_and_by_pixels(settings, kernels, full_precision):
    names = {"patch": "upsample_add_patch_kernel", "any": "upsample_add_kernel"}
    operands = Case("upsample_add", "sizes", settings).operands(torch.float16)
    with simt.emulate() as emulation:
        assert_within_budget("upsample_add", operands, "triton")
    launched = [launch.report.kernel for launch in emulation.launches]
    assert launched == [names[kernel] for kernel in kernels.split()]


def test_layer_norm_far_from_zero_is_exact():
    x = torch.randn(2, 24, 3, 5) + 2**20
    with simt.emulate():
        result = ek.ops.layer_norm_2d(x, backend="triton")
    expected = formula("layer_norm_2d")(x.double(), None, None)
    # A mean of that size is off by up to 2^-4, differences from it are exact. Once that is taken
    # off, about three roundings are left, of values of at most 24 ** 0.5 < 5.
    assert (result - expected).abs().max() < 15 * torch.finfo(torch.float32).eps


def test_fused_models_run_their_blocks_in_triton(full_precision):
    torch.manual_seed(0)
    block = ek.nn.EfficientViTBlock(64, dim=32, expand_ratio=2, scales=(5,), act_func="gelu").eval()
    x = torch.randn(1, 64, 8, 9)
    with simt.emulate() as emulation:
        fused = ek.fuse(block, backend="triton")
        with torch.no_grad():
            torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-5)
    assert {swapped.backend for swapped in fused.fusion_report.swapped} == {"triton"}
    assert len(emulation.launches) > 5
    with pytest.raises(BackendUnavailableError, match="PyTorch finds no GPU"):
        fused(x)


def test_compiled_graphs_call_the_kernels(full_precision):
    x, weight = torch.randn(1, 16, 5, 6), torch.randn(24, 16, 1, 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, weight):
        return ek.ops.conv_act(x, weight, activation="relu", backend="triton") + 1

    with simt.emulate() as emulation:
        result = compiled(x, weight)
    torch.testing.assert_close(result, torch.relu(F.conv2d(x, weight)) + 1)
    assert len(emulation.launches) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_how_to_do_without():
    with pytest.raises(BackendUnavailableError, match=r"finds no GPU.*simt\.emulate"):
        implementation("conv_act", "triton", "cpu", torch.float32)
    with simt.emulate(), pytest.raises(BackendUnavailableError, match="no kernel for conv_act"):
        implementation("conv_act", "triton", "cpu", torch.float64, emulated=True)
    # The executor is slow: nothing runs there that is not asked to.
    with simt.emulate() as emulation:
        ek.ops.conv_act(torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1))
    assert not emulation.launches
