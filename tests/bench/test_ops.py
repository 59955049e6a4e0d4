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
    test_ops.test_layer(stopwatch, 0, "cpu", "bfloat16", "reference")
    (result,) = stopwatch.results
    assert (result.shape, result.dtype) == ((1, 8, 2, 3), torch.bfloat16)
    assert stopwatch.group == "layer_norm_2d 8 2x3 cpu bfloat16"
    assert stopwatch.extra_info == {"calls per encoder forward": {"a variant": 4}}


def test_a_backend_outside_its_budget_is_not_timed(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> list[Row]:
        return [dataclasses.replace(row, failure="too far off") for row in judge(*arguments)]

    monkeypatch.setattr(test_ops, "judge", failing)
    with pytest.raises(pytest.fail.Exception, match="too far off"):
        test_ops.test_layer(stopwatch, 0, "cpu", "float32", "reference")
    assert stopwatch.results == []


def test_a_gpu_has_done_its_work_when_the_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(None))
    monkeypatch.setattr(test_ops, "call", lambda *arguments: torch.ones(1))
    for device, waits in (("cpu", 0), ("cuda", 1)):
        assert test_ops._called("layer_norm_2d", {}, "triton", device) == 1
        assert len(waited) == waits


def test_both_devices_are_timed_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_ops, "_LAYERS", test_ops._LAYERS[:1])
    monkeypatch.setattr(test_ops, "available_backends", lambda *_: ["reference"])
    for there_is_one, expected in ((False, {"cpu"}), (True, {"cpu", "cuda"})):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=there_is_one: found)
        assert {parameter.values[1] for parameter in test_ops._parameters()} == expected
