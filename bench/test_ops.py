"""Times every operation on the layers of the models, per backend and dtype, with pytest-benchmark.

`python -m pytest bench --benchmark-only`; -k chooses, as in -k "fused_mbconv and cpu and bfloat16".
A backend whose numbers are outside their error budget is not timed: its test fails.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.layers import Layer, load
from evsam_kernels.numerics.budget import Expectation, call, expect, judge
from evsam_kernels.numerics.cases import Operands
from evsam_kernels.numerics.validation import available_backends

_LAYERS = load()


def _parameters() -> Iterator[Any]:
    """Backends last, so that those that share a float64 result come one after the other."""
    for index, layer in enumerate(_LAYERS):
        for dtype in ("float32", "bfloat16"):
            for backend in available_backends(layer.op, "cpu"):
                name = f"{layer.op}-{layer.name}-{dtype}-{backend}"
                yield pytest.param(index, dtype, backend, id=name)


@functools.lru_cache(maxsize=1)
def _prepared(index: int, dtype: str) -> tuple[Operands, dict[str, Expectation]]:
    layer: Layer = _LAYERS[index]
    operands = layer.operands(getattr(torch, dtype))
    return operands, expect(layer.op, operands)


@pytest.mark.parametrize(("index", "dtype", "backend"), _parameters())
def test_layer(benchmark: Any, index: int, dtype: str, backend: str) -> None:
    layer = _LAYERS[index]
    operands, expected = _prepared(index, dtype)
    (row,) = judge(layer.op, layer.name, backend, operands, expected)
    if not row.passed:
        pytest.fail(str(row), pytrace=False)
    benchmark.group = f"{layer.op} {layer.name} {dtype}"
    benchmark.extra_info["calls per encoder forward"] = layer.count
    with torch.inference_mode():
        benchmark(call, layer.op, operands, backend)
