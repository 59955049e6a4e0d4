"""Small operands of every operation, with everything optional present and with nothing of it."""

from __future__ import annotations

import torch
from torch import Tensor

from evsam_kernels.numerics.cases import Case, Operands, map_operands
from evsam_kernels.numerics.validation import available_backends
from evsam_kernels.ops.registry import OPERATIONS

# The eps of the attentions is large enough to make them smooth where a token meets no key.
SMALL = [
    Case(
        "conv_act",
        "full",
        {
            "channels": (4, 6),
            "size": (4, 5),
            "stride": 2,
            "groups": 2,
            "activation": "gelu",
            "residual": True,
        },
    ),
    Case("conv_act", "bare", {"channels": (3, 2), "size": (3, 4), "dilation": 2, "bias": False}),
    Case(
        "fused_mbconv",
        "full",
        {"channels": (3, 5, 4), "size": (4, 3), "stride": 2, "residual": True},
    ),
    Case(
        "fused_mbconv",
        "bare",
        {"channels": (2, 3, 2), "size": (3, 2), "bias": (False, False), "activation": None},
    ),
    Case("mbconv", "full", {"channels": (3, 5, 4), "size": (4, 3), "stride": 2, "residual": True}),
    Case(
        "mbconv",
        "bare",
        {"channels": (2, 3, 2), "size": (3, 2), "bias": (False,) * 3, "activation": None},
    ),
    Case(
        "relu_linear_attention",
        "many tokens",
        {"heads": 2, "head_dim": 3, "size": (2, 4), "eps": 0.1},
    ),
    Case(
        "relu_linear_attention",
        "few tokens",
        {"heads": 1, "head_dim": 5, "size": (2, 2), "eps": 0.1},
    ),
    Case(
        "multi_scale_attention",
        "full",
        {
            "channels": (3, 4),
            "heads": 1,
            "head_dim": 4,
            "scales": (3, 5),
            "size": (2, 3),
            "bias": (True, True),
            "scale_bias": True,
            "eps": 0.1,
        },
    ),
    Case(
        "multi_scale_attention",
        "bare",
        {
            "channels": (3, 2),
            "heads": 2,
            "head_dim": 2,
            "scales": (),
            "size": (1, 2),
            "residual": False,
            "eps": 0.1,
        },
    ),
    Case("layer_norm_2d", "full", {"channels": 4, "size": (2, 3)}),
    Case("layer_norm_2d", "bare", {"channels": 3, "size": (1, 2), "weight": False, "bias": False}),
    Case("upsample_add", "full", {"channels": 2, "inputs": ((2, 3), (4, 4)), "size": (5, 4)}),
    Case("upsample_add", "bare", {"channels": 2, "inputs": ((2, 3),), "size": (2, 3)}),
]

BACKENDS = [(op, backend) for op in OPERATIONS for backend in available_backends(op, "cpu")]
"""Every operation with every backend that can run it here, and with "auto"."""
BACKENDS += [(op, "auto") for op in OPERATIONS]


def case_id(case: Case) -> str:
    """Names a test after its case."""
    return f"{case.op}-{case.name}"


def small(op: str, dtype: torch.dtype = torch.float32) -> Operands:
    """Operands of `op` with everything optional present."""
    return next(case for case in SMALL if case.op == op).operands(dtype)


def operator(op: str):
    """The registered operator, called with operands as in its schema and a backend's name."""
    return getattr(torch.ops.evsam, op).default


def with_gradients(operands: Operands) -> tuple[Operands, list[Tensor]]:
    """The operands with their tensors as leaves that require gradients; and these."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    return map_operands(leaf, operands), leaves
