"""Every operation within its error budget: each case, dtype and backend, gradients included."""

from __future__ import annotations

import pytest
import torch
from support.operands import BACKENDS

from evsam_kernels.numerics.budget import assert_within_budget, call
from evsam_kernels.numerics.cases import Case
from evsam_kernels.numerics.validation import plan, validate
from evsam_kernels.ops.registry import formula


@pytest.mark.parametrize(
    "step", plan(), ids=lambda step: f"{step.case.op}-{step.case.name}-{step.dtype}"
)
def test_case(step):
    (rows,) = validate([step])
    assert len(rows) >= len(step.backends)
    failed = [str(row) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("op", "backend"), [pair for pair in BACKENDS if pair[0] == "layer_norm_2d"]
)
def test_layer_norm_is_finite_where_the_float16_formula_is_not(op, backend):
    operands = Case(op, "squares overflow", {"channels": 64}).operands(torch.float16)
    operands |= {"x": operands["x"] * 1000, "weight": None, "bias": None}
    square = formula(op)(**operands)
    assert not square.count_nonzero(), "1 / inf: the map collapses to nothing"
    operands["x"] = (operands["x"] + 40000).clamp(max=65000)
    output = call(op, operands, backend)
    assert output.isfinite().all()
    assert output.count_nonzero() > 0.9 * output.numel()
    assert_within_budget(op, operands, backend)


@pytest.mark.parametrize(
    ("op", "backend"), [pair for pair in BACKENDS if pair[0] == "relu_linear_attention"]
)
@pytest.mark.parametrize("size", [(3, 4), (16, 16)], ids=["few tokens", "many tokens"])
def test_attention_is_finite_where_the_float16_formula_is_not(op, backend, size):
    operands = Case(op, "sums overflow", {"size": size}).operands(torch.float16)
    operands["qkv"] = operands["qkv"] * 200
    assert not formula(op)(**operands).isfinite().all()
    assert call(op, operands, backend).isfinite().all()
    assert_within_budget(op, operands, backend, gradients=True)
