"""The layers in layers.json are those of the models."""

from __future__ import annotations

import pytest
import torch

from bench import layers
from bench.layers import Layer
from evsam_kernels.numerics.budget import named_tensors
from evsam_kernels.ops.registry import OPERATIONS
from evsam_kernels.sam.zoo import VARIANTS


def test_the_file_holds_the_layers_of_the_models() -> None:
    assert layers.load() == layers.from_models(), "run python -m bench.layers"


def test_every_operation_of_every_variant_is_there() -> None:
    found = {(layer.op, variant) for layer in layers.load() for variant in layer.count}
    assert found == {(op, variant) for op in OPERATIONS for variant in VARIANTS}


def test_names_are_unique() -> None:
    names = [(layer.op, layer.name) for layer in layers.load()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("variant", ["efficientvit-sam-l0", "efficientvit-sam-xl0"])
def test_operands_are_those_that_the_model_gives(variant: str) -> None:
    """Every call of the model, as operands, is among those that the file's layers make."""
    called = [(op, _described(operands)) for op, operands in layers.calls(variant)]
    made = [
        (layer.op, _described(layer.operands(torch.float32)))
        for layer in layers.load()
        if variant in layer.count
    ]
    for call in called:
        assert call in made


def _described(operands: dict[str, object]) -> dict[str, object]:
    """Shapes of the tensors, and the settings."""
    shapes = {name: tuple(x.shape) for name, x in named_tensors(operands).items()}
    settings = {
        name: value
        for name, value in operands.items()
        if value is None or isinstance(value, (int, float, str))
    }
    return {**shapes, **settings}


def test_values_follow_from_the_name() -> None:
    layer = Layer("layer_norm_2d", "8 2x3", {"channels": 8, "size": [2, 3]}, {})
    first, second = (layer.operands(torch.float32, batch=3)["x"] for _ in range(2))
    assert first.shape == (3, 8, 2, 3)
    assert torch.equal(first, second)
    layer.name = "another"
    assert not torch.equal(layer.operands(torch.float32, batch=3)["x"], first)
