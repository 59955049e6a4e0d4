"""Which backend "auto" takes for a layer on a GPU: the table, and who asks it."""

from __future__ import annotations

import json

import pytest
import torch

from evsam_kernels import backends
from evsam_kernels.backends import Backend
from evsam_kernels.ops import choice, registry
from evsam_kernels.ops.choice import Layer


def test_the_table_names_operations_with_both_kernels_and_no_layer_twice() -> None:
    table = json.loads(choice._TABLE.read_text())
    assert table["made_with"]
    for op in table["cuda"]:
        assert registry.has_kernel(op, "cuda") and registry.has_kernel(op, "triton")
        rules = choice.rules(op)
        for rule in rules:
            assert 1 <= rule.least_channels <= rule.most_channels
            assert rule.strides == sorted(set(rule.strides)) and set(rule.strides) <= {1, 2}
            ends = (rule.least_channels, rule.most_channels)
            layers = [Layer(channels, stride) for channels in ends for stride in rule.strides]
            assert all(sum(other.holds(layer) for other in rules) == 1 for layer in layers)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """CUDA for mbconv with 32 to 64 channels and stride 2."""
    rule = {"least_channels": 32, "most_channels": 64, "strides": [2]}
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({"cuda": {"mbconv": [rule]}}))
    monkeypatch.setattr(choice, "_TABLE", path)
    choice.rules.cache_clear()
    for name in ("triton", "cuda"):
        there = Backend(name, "a GPU", ("cuda",), lambda: None)
        monkeypatch.setitem(backends.BACKENDS, name, there)
    yield
    choice.rules.cache_clear()


@pytest.mark.parametrize(
    ("op", "layer", "expected"),
    [
        ("mbconv", Layer(32, 2), "cuda"),
        ("mbconv", Layer(64, 2), "cuda"),
        ("mbconv", Layer(65, 2), "triton"),
        ("mbconv", Layer(31, 2), "triton"),
        ("mbconv", Layer(64, 1), "triton"),
        ("mbconv", None, "triton"),
        ("conv_act", Layer(64, 2), "triton"),
    ],
)
def test_auto_goes_by_the_table(op: str, layer: Layer | None, expected: str, table) -> None:
    assert registry.chosen_backend(op, "auto", "cuda", torch.float16, layer) == expected


def test_the_table_says_nothing_of_backends_that_are_not_there(table, monkeypatch) -> None:
    missing = Backend("cuda", "a GPU", ("cuda",), lambda: "not built")
    monkeypatch.setitem(backends.BACKENDS, "cuda", missing)
    layer = Layer(64, 2)
    assert registry.chosen_backend("mbconv", "auto", "cuda", torch.float16, layer) == "triton"
    monkeypatch.setitem(
        backends.BACKENDS, "triton", Backend("triton", "", ("cuda",), lambda: "none")
    )
    assert registry.chosen_backend("mbconv", "auto", "cuda", torch.float16, layer) == "reference"
