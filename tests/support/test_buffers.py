"""The guards of the kernel tests notice what they are there to notice."""

from __future__ import annotations

import pytest
import torch
from support.buffers import Guarded, guarded_inputs, guarded_outputs, nan_filled_memory

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(3, 5),
        torch.empty_like,
        lambda x: x.new_empty(3, 5),
        lambda x: x.new_empty_strided((3, 5), (1, 3)),
        lambda x: torch.empty_strided((3, 5), (1, 3)),
    ],
    ids=["empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided"],
)
def test_uninitialised_memory_is_nan(allocate):
    with nan_filled_memory():
        assert allocate(torch.ones(3, 5)).isnan().all()


def test_memory_filling_ends_with_the_context():
    with nan_filled_memory():
        pass
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), nan_filled_memory():
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_read_as_nan(dtype):
    tensor = Guarded((2, 3), (3, 1), dtype).tensor
    tensor.fill_(1)
    assert tensor.as_strided((1,), (1,), tensor.storage_offset() + 6).isnan()
    assert tensor.as_strided((1,), (1,), tensor.storage_offset() - 1).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("place", [-77, -1, 6, 82])
def test_writing_beside_a_tensor_is_noticed(dtype, value, place):
    guard = Guarded((2, 3), (3, 1), dtype)
    guard.tensor.fill_(1)
    guard.check("x")
    guard.tensor.as_strided((1,), (1,), guard.tensor.storage_offset() + place).fill_(value)
    with pytest.raises(AssertionError, match=rf"x: written outside the tensor.*\[{place}\]"):
        guard.check("x")


def test_writing_between_the_rows_of_a_tensor_is_noticed():
    guard = Guarded((2, 3), (5, 1), torch.float32)
    guard.tensor.as_strided((5,), (1,), guard.tensor.storage_offset()).fill_(1)
    with pytest.raises(AssertionError, match=r"\[3, 4\]"):
        guard.check("x")


def test_an_empty_tensor_is_all_margin():
    guard = Guarded((0, 3), (3, 1), torch.float32)
    guard.check("x")
    assert guard.tensor.shape == (0, 3)


def test_inputs_keep_values_strides_and_settings():
    x = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    with guarded_inputs({"x": x, "several": [x, x + 1], "absent": None, "stride": 2}) as guarded:
        assert torch.equal(guarded["x"], x)
        assert guarded["x"].stride() == x.stride()
        assert torch.equal(guarded["several"][1], x + 1)
        assert guarded["absent"] is None
        assert guarded["stride"] == 2


def test_modified_inputs_are_noticed():
    with (
        pytest.raises(AssertionError, match="input 1: was modified"),
        guarded_inputs([torch.ones(3), torch.ones(3)]) as guarded,
    ):
        guarded[1][2] = 0


def test_inputs_written_beside_are_noticed():
    with (
        pytest.raises(AssertionError, match="input 0: written outside"),
        guarded_inputs([torch.ones(3)]) as guarded,
    ):
        guarded[0].as_strided((4,), (1,)).fill_(1)


def test_outputs_written_beside_are_noticed(monkeypatch):
    with (
        pytest.raises(AssertionError, match="output 0: written outside"),
        guarded_outputs(monkeypatch),
    ):
        out = torch.ones(3).new_empty_strided((2, 3), (3, 1))
        out.as_strided((7,), (1,)).fill_(1)


def test_outputs_are_recorded_and_patching_ends(monkeypatch):
    with guarded_outputs(monkeypatch) as guards:
        out = torch.ones(3).new_empty_strided((2, 3), (3, 1)).fill_(1)
        assert guards[0].tensor is out
    torch.ones(3).new_empty_strided((2, 3), (3, 1))
    assert len(guards) == 1
