"""What every operation promises beside its numbers: layout, memory, autocast, threads, gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.buffers import guarded_inputs, guarded_outputs, nan_filled_memory
from support.operands import BACKENDS, SMALL, case_id, operator, small, with_gradients
from torch import Tensor
from torch.utils._pytree import tree_map_only

from evsam_kernels.numerics.budget import (
    assert_within_budget,
    call,
    evaluate,
    judge,
    named_tensors,
)
from evsam_kernels.numerics.budget import expect as expectations
from evsam_kernels.numerics.cases import CASES, Case
from evsam_kernels.numerics.validation import DTYPES, available_backends
from evsam_kernels.ops.layout import channels_last_strides
from evsam_kernels.ops.registry import OPERATIONS

QUICK = [case for op in OPERATIONS for case in CASES[op] if case.quick]
each_backend = pytest.mark.parametrize(("op", "backend"), BACKENDS)


def storages(operands) -> set[int]:
    return {
        tensor.untyped_storage().data_ptr() for tensor in named_tensors(operands).values()
    }


@pytest.mark.parametrize("case", [*QUICK, *SMALL], ids=case_id)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_and_layout(case, dtype, monkeypatch):
    """Reads only its operands, writes only its output, in exact NHWC strides."""
    operands = case.operands(DTYPES[dtype])
    expected = expectations(case.op, operands)
    for backend in available_backends(case.op, "cpu"):
        with guarded_inputs(operands) as guarded, nan_filled_memory():
            with guarded_outputs(monkeypatch):
                output = call(case.op, guarded, backend)
            assert output.untyped_storage().data_ptr() not in storages(guarded)
            (row,) = judge(case.op, case.name, backend, guarded, expected)
            assert row.passed, str(row)
        assert output.dtype == DTYPES[dtype]
        assert output.stride() == channels_last_strides(output.shape)


def test_kernels_take_their_outputs_where_the_guards_are(monkeypatch):
    for op, backend in BACKENDS:
        with guarded_outputs(monkeypatch) as guards:
            output = call(op, small(op), backend)
        if backend == "cpu":
            assert any(guard.tensor.data_ptr() == output.data_ptr() for guard in guards), op


@each_backend
def test_the_result_of_one_map_of_equal_size_is_no_alias(op, backend):
    if op != "upsample_add":
        pytest.skip("only upsample_add has nothing to compute for some operands")
    x = torch.randn(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    output = call(op, {"maps": [x], "height": 3, "width": 3}, backend)
    torch.testing.assert_close(output, x)
    assert storages({"output": output}).isdisjoint(storages({"x": x}))
