"""The timing of operations: what is handed to pytest-benchmark, and that wrong numbers are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import test_ops
from bench.layers import Layer
from evsam_kernels.numerics.budget import Row, judge


class Stopwatch:
    """Stands in for pytest-benchmark's fixture: calls once, and keeps the result."""

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self.results: list[Tensor] = []

    def __call__(self, function: Callable[..., Tensor], *arguments: Any) -> None:
        self.results.append(function(*arguments))


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stopwatch]:
    layer = Layer("layer_norm_2d", "8 2x3", {"channels": 8, "size": [2, 3]}, {"a variant": 4})
    monkeypatch.setattr(test_ops, "_LAYERS", [layer])
    test_ops._prepared.cache_clear()
    yield Stopwatch()
    test_ops._prepared.cache_clear()


def test_the_public_function_is_timed(stopwatch: Stopwatch) -> None:
    test_ops.test_layer(stopwatch, 0, "bfloat16", "reference")
    (result,) = stopwatch.results
    assert (result.shape, result.dtype) == ((1, 8, 2, 3), torch.bfloat16)
    assert stopwatch.group == "layer_norm_2d 8 2x3 bfloat16"
    assert stopwatch.extra_info == {"calls per encoder forward": {"a variant": 4}}


def test_a_backend_outside_its_budget_is_not_timed(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> list[Row]:
        return [dataclasses.replace(row, failure="too far off") for row in judge(*arguments)]

    monkeypatch.setattr(test_ops, "judge", failing)
    with pytest.raises(pytest.fail.Exception, match="too far off"):
        test_ops.test_layer(stopwatch, 0, "float32", "reference")
    assert stopwatch.results == []
