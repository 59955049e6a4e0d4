"""Properties of every operation on every backend, on operands that hypothesis makes up."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evsam_kernels import simt
from evsam_kernels.numerics.budget import assert_within_budget, call
from evsam_kernels.numerics.cases import Case, map_operands
from evsam_kernels.numerics.tf32 import tf32
from evsam_kernels.numerics.validation import available_backends
from evsam_kernels.ops.layout import channels_last_strides
from evsam_kernels.ops.registry import OPERATIONS, has_kernel

EMULATED = ("triton", "cuda")
can_emulate = importlib.util.find_spec("evsam_kernels._simt") is not None
HERE = [(op, name) for op in OPERATIONS for name in available_backends(op, "cpu")]
IN_EXECUTOR = [
    pytest.param(
        op,
        name,
        marks=pytest.mark.skipif(
            not can_emulate or (name == "triton" and not importlib.util.find_spec("triton")),
            reason="the executor was not built, or Triton is not installed",
        ),
    )
    for op in OPERATIONS
    for name in EMULATED
    if importlib.util.find_spec(f"evsam_kernels.ops.{op}.{name}")
]

sides = st.integers(1, 9)
channels = st.integers(1, 20)
activations = st.sampled_from([None, "relu", "relu6", "hswish", "silu", "gelu"])


def convolution(count: int) -> dict:
    """Settings of a block with that many convolutions beyond the first."""
    return {
        "channels": st.tuples(*[channels] * (count + 2)),
        "kernel": st.sampled_from([1, 3, 5]),
        "stride": st.integers(1, 3),
        "activation": activations,
        "bias": st.booleans() if count == 0 else st.tuples(*[st.booleans()] * (count + 1)),
        "residual": st.booleans(),
        "size": st.tuples(sides, sides),
    }


SETTINGS = {
    "conv_act": convolution(0) | {"dilation": st.integers(1, 2)},
    "fused_mbconv": convolution(1),
    "mbconv": convolution(1) | {"bias": st.tuples(*[st.booleans()] * 3)},
    "relu_linear_attention": {
        "heads": st.integers(1, 3),
        "head_dim": st.integers(1, 17),
        "size": st.tuples(sides, sides),
    },
    "multi_scale_attention": {
        "channels": st.tuples(channels, channels),
        "heads": st.integers(1, 2),
        "head_dim": st.sampled_from([4, 8, 16]),
        "scales": st.sampled_from([(), (3,), (5,), (3, 5)]),
        "bias": st.tuples(st.booleans(), st.booleans()),
        "scale_bias": st.booleans(),
        "residual": st.booleans(),
        "size": st.tuples(sides, sides),
    },
    "layer_norm_2d": {
        "channels": st.integers(2, 40),
        "weight": st.booleans(),
        "bias": st.booleans(),
        "size": st.tuples(sides, sides),
    },
    "upsample_add": {
        "channels": channels,
        "inputs": st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
        "size": st.tuples(sides, sides),
    },
}


@st.composite
def cases(draw, op: str) -> Case:
    chosen = {name: draw(strategy) for name, strategy in SETTINGS[op].items()}
    batch = draw(st.integers(1, 4))
    return Case(op, f"seed {draw(st.integers(0, 99))}", chosen | {"batch": batch})


def channels_first(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def in_any_order(tensor: Tensor) -> Tensor:
    """Its dimensions lie in memory the other way round."""
    backwards = tuple(reversed(range(tensor.dim())))
    return tensor.permute(backwards).contiguous().permute(backwards)


def with_gaps(tensor: Tensor) -> Tensor:
    """Values between NaN, in every dimension."""
    larger = tensor.new_full([2 * length for length in tensor.shape], float("nan"))
    view = larger[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


layouts = st.sampled_from([None, channels_first, in_any_order, with_gaps])


def check(op: str, backend: str, case: Case, dtype: torch.dtype, view) -> None:
    operands = case.operands(dtype)
    if view is not None:
        operands = map_operands(view, operands)
    found = call(op, operands, backend)
    assert found.stride() == channels_last_strides(found.shape)
    assert found.dtype == dtype
    assert found.isfinite().all()
    # Budgets are relative: they say something where there is something.
    if found.count_nonzero() >= 32:
        assert_within_budget(op, operands, backend)


@pytest.mark.parametrize(("op", "backend"), HERE)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_operands(op, backend, data):
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    dtype = data.draw(st.sampled_from([one for one in dtypes if has_kernel(op, backend, one)]))
    check(op, backend, data.draw(cases(op)), dtype, data.draw(layouts))


@pytest.mark.parametrize(("op", "backend"), IN_EXECUTOR)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.generate],  # To shrink what fails takes minutes there.
)
@given(data=st.data())
def test_any_operands_in_the_executor(op, backend, data):
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    case, view = data.draw(cases(op)), data.draw(layouts)
    with tf32(False), simt.emulate() if backend in EMULATED else nullcontext():
        check(op, backend, case, dtype, view)
