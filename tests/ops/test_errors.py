"""Every operation refuses what it cannot compute, and says what was given and what is accepted."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.operands import operator, small
from torch import Tensor

from evsam_kernels.backends import BACKENDS, Backend, BackendUnavailableError
from evsam_kernels.numerics.budget import call, named_tensors
from evsam_kernels.numerics.cases import map_operands
from evsam_kernels.ops.registry import OPERATIONS

CONVOLUTIONS = ("conv_act", "fused_mbconv", "mbconv")
ATTENTIONS = ("relu_linear_attention", "multi_scale_attention")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def error(op: str, message: str, kind: type[Exception] = ValueError, **changes: object):
    """A call that must fail: the small operands of `op`, some of them replaced."""
    return pytest.param(op, changes, kind, message, id=f"{op}: {message}")


# The small operands: conv_act x [2, 4, 4, 5] -> [2, 6, 2, 3] in 2 groups; fused_mbconv and mbconv x
# [2, 3, 4, 3] through 5 channels -> [2, 4, 2, 2]; relu_linear_attention qkv [2, 18, 2, 4], head_dim
# 3; multi_scale_attention x [2, 3, 2, 3] through 12 channels, scales 3 and 5, head_dim 4;
# layer_norm_2d x [2, 4, 2, 3]; upsample_add [2, 2, 2, 3] and [2, 2, 4, 4].
ERRORS = [
    # Settings.
    *(error(op, "stride must be at least 1, got 0", stride=0) for op in CONVOLUTIONS),
    *(
        error(
            op,
            "activation must be None or one of 'relu', 'relu6', 'hswish', 'silu', 'gelu', "
            "got 'tanh'",
            activation="tanh",
        )
        for op in CONVOLUTIONS
    ),
    error("conv_act", "dilation must be at least 1, got -1", dilation=-1),
    error("conv_act", "groups must be at least 1, got 0", groups=0),
    error(
        "conv_act",
        "groups must divide the 4 input and the 6 output channels of weight, got 3",
        groups=3,
    ),
    *(error(op, "head_dim must be at least 1, got 0", head_dim=0) for op in ATTENTIONS),
    error(
        "relu_linear_attention",
        "qkv must have heads * 3 * head_dim channels with head_dim 4, got 18 channels",
        head_dim=4,
    ),
    error(
        "multi_scale_attention",
        "qkv_weight must have heads * 3 * head_dim output channels with head_dim 3, got 12",
        head_dim=3,
    ),
    *(error(op, "eps must not be negative, got -1.0", eps=-1.0) for op in ATTENTIONS),
    error("layer_norm_2d", "eps must not be negative, got -1.0", eps=-1.0),
    error("layer_norm_2d", "eps must not be negative, got nan", eps=float("nan")),
    error("upsample_add", "height must be at least 1, got 0", height=0),
    error("upsample_add", "width must be at least 1, got -3", width=-3),
    # Maps.
    error("conv_act", "x must have shape [B, C, H, W], got (4, 4, 5)", x=ones(4, 4, 5)),
    error(
        "layer_norm_2d",
        "x must have at least one channel, row and column, got (2, 4, 0, 3)",
        x=ones(2, 4, 0, 3),
    ),
    error("relu_linear_attention", "qkv must have shape [B, C, H, W], got (18,)", qkv=ones(18)),
    error("upsample_add", "maps must hold at least one map, got an empty list", maps=[]),
    error(
        "upsample_add",
        "maps[1] must have shape (2, 2, 3, 3), got (1, 2, 3, 3)",
        maps=[ones(2, 2, 4, 4), ones(1, 2, 3, 3)],
    ),
    error(
        "upsample_add",
        "maps[1] must have shape (1, 2, 3, 3), got (1, 4, 3, 3)",
        maps=[ones(1, 2, 4, 4), ones(1, 4, 3, 3)],
    ),
    error(
        "upsample_add",
        "maps[1] must have shape [B, C, H, W], got (2, 3)",
        maps=[ones(1, 2, 4, 4), ones(2, 3)],
    ),
    # Weights.
    error(
        "conv_act",
        "weight must have shape [out_channels, in_channels / groups, k, k] with k odd, "
        "got (6, 2, 2, 2)",
        weight=ones(6, 2, 2, 2),
    ),
    error(
        "conv_act",
        "weight must have shape [out_channels, in_channels / groups, k, k] with k odd, "
        "got (6, 2, 3, 1)",
        weight=ones(6, 2, 3, 1),
    ),
    error(
        "conv_act", "weight must have shape (6, 2, 3, 3), got (6, 4, 3, 3)", weight=ones(6, 4, 3, 3)
    ),
    error(
        "fused_mbconv",
        "spatial_weight must have shape (5, 3, 3, 3), got (5, 2, 3, 3)",
        spatial_weight=ones(5, 2, 3, 3),
    ),
    error(
        "fused_mbconv",
        "point_weight must have shape [out_channels, in_channels, 1, 1], got (4, 5, 3, 3)",
        point_weight=ones(4, 5, 3, 3),
    ),
    error(
        "fused_mbconv",
        "point_weight must have shape (4, 5, 1, 1), got (4, 6, 1, 1)",
        point_weight=ones(4, 6, 1, 1),
    ),
    error(
        "mbconv",
        "expand_weight must have shape [out_channels, in_channels, 1, 1], got (5, 3, 3, 3)",
        expand_weight=ones(5, 3, 3, 3),
    ),
    error(
        "mbconv",
        "depth_weight must have shape [5, 1, k, k] with k odd, got (6, 1, 3, 3)",
        depth_weight=ones(6, 1, 3, 3),
    ),
    error(
        "mbconv",
        "depth_weight must have shape (5, 1, 3, 3), got (5, 2, 3, 3)",
        depth_weight=ones(5, 2, 3, 3),
    ),
    error(
        "mbconv",
        "point_weight must have shape [out_channels, in_channels, 1, 1], got (4, 5)",
        point_weight=ones(4, 5),
    ),
    error(
        "multi_scale_attention",
        "qkv_weight must have shape [out_channels, in_channels, 1, 1], got (12, 3, 3, 3)",
        qkv_weight=ones(12, 3, 3, 3),
    ),
    error(
        "multi_scale_attention",
        "group_weights must have one tensor per scale, as depth_weights has (2), got 1",
        group_weights=[ones(12, 4, 1, 1)],
    ),
    error(
        "multi_scale_attention",
        "depth_biases must be empty or have one tensor per scale (2), got 1",
        depth_biases=[ones(12)],
    ),
    error(
        "multi_scale_attention",
        "group_biases[1] must have shape (12,), got (4,)",
        group_biases=[ones(12), ones(4)],
    ),
    error(
        "multi_scale_attention",
        "depth_weights[1] must have 12 output channels, got 24",
        depth_weights=[ones(12, 1, 3, 3), ones(24, 1, 5, 5)],
    ),
    error(
        "multi_scale_attention",
        "depth_weights[0] must have shape [out_channels, in_channels / groups, k, k] with k odd, "
        "got (12, 1, 4, 4)",
        depth_weights=[ones(12, 1, 4, 4), ones(12, 1, 5, 5)],
    ),
    error(
        "multi_scale_attention",
        "group_weights[0] must have shape (12, 4, 1, 1), got (12, 12, 1, 1)",
        group_weights=[ones(12, 12, 1, 1), ones(12, 4, 1, 1)],
    ),
    error(
        "multi_scale_attention",
        "proj_weight must have shape (4, 12, 1, 1), got (4, 4, 1, 1)",
        proj_weight=ones(4, 4, 1, 1),
    ),
    # Vectors and residuals.
    error("conv_act", "bias must have shape (6,), got (4,)", bias=ones(4)),
    error("fused_mbconv", "spatial_bias must have shape (5,), got (4,)", spatial_bias=ones(4)),
    error("fused_mbconv", "point_bias must have shape (4,), got (1, 4)", point_bias=ones(1, 4)),
    *(
        error("mbconv", f"{name} must have shape ({length},), got (7,)", **{name: ones(7)})
        for name, length in (("expand_bias", 5), ("depth_bias", 5), ("point_bias", 4))
    ),
    error("multi_scale_attention", "qkv_bias must have shape (12,), got (1,)", qkv_bias=ones(1)),
    error("multi_scale_attention", "proj_bias must have shape (4,), got (3,)", proj_bias=ones(3)),
    error("layer_norm_2d", "weight must have shape (4,), got (4, 1, 1)", weight=ones(4, 1, 1)),
    error("layer_norm_2d", "bias must have shape (4,), got (2,)", bias=ones(2)),
    error(
        "conv_act",
        "residual must have shape (2, 6, 2, 3), got (2, 6, 4, 5)",
        residual=ones(2, 6, 4, 5),
    ),
    *(
        error(
            op,
            "residual must have shape (2, 4, 2, 2), got (1, 4, 2, 2)",
            residual=ones(1, 4, 2, 2),
        )
        for op in ("fused_mbconv", "mbconv")
    ),
    error(
        "multi_scale_attention",
        "residual must have shape (2, 4, 2, 3), got (2, 3, 2, 3)",
        residual=ones(2, 3, 2, 3),
    ),
    # Dtypes.
    error(
        "conv_act",
        "x must be float16, bfloat16, float32 or float64, got torch.int64; convert it with "
        ".to(dtype)",
        TypeError,
        x=torch.ones(2, 4, 4, 5, dtype=torch.int64),
    ),
    error(
        "upsample_add",
        "maps[1] must have dtype torch.float32, as the input has, got torch.float16",
        TypeError,
        maps=[ones(2, 2, 4, 4), ones(2, 2, 4, 4).half()],
    ),
]


def compiled(op: str, operands: dict, backend: str) -> Tensor:
    torch.compiler.reset()
    function = torch.compile(lambda: call(op, operands, backend), backend="eager", fullgraph=True)
    return function()


def directly(op: str, operands: dict, backend: str) -> Tensor:
    return operator(op)(**operands, backend=backend)


@pytest.mark.parametrize(("op", "changes", "kind", "message"), ERRORS)
def test_bad_operands(op, changes, kind, message):
    operands = small(op) | changes
    for function in (call, directly):
        with pytest.raises(kind, match=rf"^{op}: {re.escape(message)}$"):
            function(op, operands, "auto")


@pytest.mark.parametrize(("op", "changes", "kind", "message"), ERRORS)
def test_bad_operands_while_compiling(op, changes, kind, message):
    # Dynamo wraps what is raised while it traces; the message stays.
    with pytest.raises((kind, torch._dynamo.exc.TorchDynamoException), match=re.escape(message)):
        compiled(op, small(op) | changes, "auto")


def with_changed(op: str, name: str, change) -> dict:
    """The small operands of `op`, `change` applied to the tensor called `name`."""
    operands = small(op)
    chosen = named_tensors(operands)[name]
    return map_operands(lambda tensor: change(tensor) if tensor is chosen else tensor, operands)


OTHERS = [(op, name) for op in OPERATIONS for name in list(named_tensors(small(op)))[1:]]


@pytest.mark.parametrize(("op", "name"), OTHERS)
def test_every_tensor_must_have_the_dtype_of_the_first(op, name):
    operands = with_changed(op, name, Tensor.double)
    for function in (call, directly):
        with pytest.raises(
            TypeError,
            match=rf"^{op}: {re.escape(name)} must have dtype torch.float32.* got torch.float64$",
        ):
            function(op, operands, "auto")


def test_weights_of_layer_norm_may_be_float32():
    operands = map_operands(Tensor.half, small("layer_norm_2d"))
    call("layer_norm_2d", operands | {"weight": ones(4), "bias": ones(4)}, "auto")
    with pytest.raises(
        TypeError,
        match=r"bias must have dtype torch.float16 or torch.float32, .*got torch.bfloat16$",
    ):
        call("layer_norm_2d", operands | {"bias": ones(4).bfloat16()}, "auto")


@pytest.mark.parametrize(("op", "name"), OTHERS)
def test_every_tensor_must_be_on_the_device_of_the_first(op, name):
    operands = with_changed(op, name, lambda tensor: tensor.to("meta"))
    with pytest.raises(
        ValueError, match=rf"^{op}: {re.escape(name)} must be on cpu, as the input is, got meta$"
    ):
        call(op, operands, "auto")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("given", [np.ones(3), [1.0], None], ids=["array", "list", "None"])
def test_the_first_operand_must_be_a_tensor(op, given):
    name = next(iter(named_tensors(small(op))))
    if name == "maps[0]":
        operands = small(op) | {"maps": [given]}
    else:
        operands = small(op) | {name: given}
    message = rf"^{op}: {re.escape(name)} must be a torch.Tensor, got {type(given).__name__}$"
    with pytest.raises(TypeError, match=message):
        call(op, operands, "auto")


@pytest.mark.parametrize(("op", "name"), [pair for pair in OTHERS if "[" not in pair[1]])
def test_any_other_operand_that_is_no_tensor_is_named(op, name):
    # The dispatcher, which raises RuntimeError, says it as clearly for optional operands.
    with pytest.raises((TypeError, RuntimeError), match=rf"\b{name}\b.* (got|type) '?ndarray"):
        call(op, small(op) | {name: np.ones(3)}, "auto")


@pytest.mark.parametrize("op", OPERATIONS)
def test_complex_maps_are_refused(op):
    first = next(iter(named_tensors(small(op))))
    operands = map_operands(lambda tensor: tensor.to(torch.complex64), small(op))
    with pytest.raises(TypeError, match=rf"^{op}: {re.escape(first)} must be float16, .*complex64"):
        call(op, operands, "auto")


@pytest.mark.parametrize("op", OPERATIONS)
def test_unknown_backend(op):
    for function in (call, directly, compiled):
        with pytest.raises(
            (ValueError, torch._dynamo.exc.TorchDynamoException),
            match=r"backend must be one of 'auto', 'reference'.*got 'cudnn'",
        ):
            function(op, small(op), "cudnn")


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_backend_without_a_kernel_names_those_that_have_one(op, monkeypatch):
    monkeypatch.setitem(BACKENDS, "other", Backend("other", "nothing", None, lambda: None))
    with pytest.raises(
        BackendUnavailableError, match=rf"'other' has no kernel for {op} at .*'auto'"
    ):
        call(op, small(op), "other")


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_backend_that_cannot_run_here_says_why(op, monkeypatch):
    broken = Backend("other", "nothing", None, lambda: "not built; install a compiler")
    monkeypatch.setitem(BACKENDS, "other", broken)
    with pytest.raises(BackendUnavailableError, match="not built; install a compiler"):
        call(op, small(op), "other")
