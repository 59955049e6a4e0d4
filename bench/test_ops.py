"""Times every operation on the layers of the models, on every device, with pytest-benchmark.

`python -m pytest bench --benchmark-only`; -k chooses, as in -k "fused_mbconv and cpu and bfloat16".
A backend whose numbers are outside their error budget is not timed: its test fails.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.layers import Layer, load
from evsam_kernels.numerics.budget import Expectation, call, expect, judge
from evsam_kernels.numerics.cases import Operands, map_operands
from evsam_kernels.numerics.validation import available_backends

_LAYERS = load()


_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "bfloat16")}


def _parameters() -> Iterator[Any]:
    """Backends last, so that those that share a float64 result come one after the other."""
    for index, layer in enumerate(_LAYERS):
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for dtype in _DTYPES[device]:
                for backend in available_backends(layer.op, device, getattr(torch, dtype)):
                    name = f"{layer.op}-{layer.name}-{device}-{dtype}-{backend}"
                    yield pytest.param(index, device, dtype, backend, id=name)


@functools.lru_cache(maxsize=1)
def _prepared(index: int, device: str, dtype: str) -> tuple[Operands, dict[str, Expectation]]:
    layer: Layer = _LAYERS[index]
    operands = map_operands(lambda x: x.to(device), layer.operands(getattr(torch, dtype)))
    return operands, expect(layer.op, operands)


def _called(op: str, operands: Operands, backend: str, device: str) -> Tensor:
    """The result; what a GPU was given to do is done."""
    result = call(op, operands, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize(("index", "device", "dtype", "backend"), _parameters())
def test_layer(benchmark: Any, index: int, device: str, dtype: str, backend: str) -> None:
    layer = _LAYERS[index]
    operands, expected = _prepared(index, device, dtype)
    (row,) = judge(layer.op, layer.name, backend, operands, expected)
    if not row.passed:
        pytest.fail(str(row), pytrace=False)
    benchmark.group = f"{layer.op} {layer.name} {device} {dtype}"
    benchmark.extra_info["calls per encoder forward"] = layer.count
    with torch.inference_mode():
        benchmark(_called, layer.op, operands, backend, device)
