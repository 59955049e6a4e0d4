"""Memory that gives away kernels which read or write where they must not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# A NaN, so that what is read from a margin spoils the result; not the NaN that arithmetic makes, so
# that writing one is noticed as well.
_SENTINELS = {
    torch.float16: (torch.int16, 0x7EAD),
    torch.bfloat16: (torch.int16, 0x7FAD),
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.float64: (torch.int64, 0x7FF8DEAD_DEADBEEF),
}
_MARGIN = 77
"""Elements before and after a guarded tensor: odd, so that no vector is aligned by chance."""


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return with NaN, on every backend of PyTorch's."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Guarded:
    """A tensor inside a larger buffer of sentinels.

    Attributes:
        tensor: uninitialised, with the size and strides asked for.
    """

    def __init__(self, size: Any, stride: Any, dtype: torch.dtype) -> None:
        extent = 0
        if all(length > 0 for length in size):
            extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        as_integer, self._sentinel = _SENTINELS[dtype]
        self._bits = torch.full((extent + 2 * _MARGIN,), self._sentinel, dtype=as_integer)
        self.tensor = self._bits.view(dtype).as_strided(size, stride, _MARGIN)
        outside = torch.ones_like(self._bits, dtype=torch.bool)
        outside.as_strided(size, stride, _MARGIN).fill_(False)
        self._outside = outside

    def check(self, name: str) -> None:
        """Raise AssertionError if anything but `tensor` was written."""
        changed = (self._outside & (self._bits != self._sentinel)).nonzero().flatten()
        if len(changed):
            places = (changed - _MARGIN).tolist()
            raise AssertionError(f"{name}: written outside the tensor, at elements {places[:8]}")


@contextmanager
def guarded_inputs(operands: Any) -> Iterator[Any]:
    """Yield copies of the operands whose tensors lie among sentinels; nothing may write to them.

    Raises:
        AssertionError: on leaving, if a tensor or what surrounds it was changed.
    """
    leaves, structure = tree_flatten(operands)
    guards: dict[int, Guarded] = {}
    copies = copy.copy(leaves)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            guards[index] = Guarded(leaf.shape, leaf.stride(), leaf.dtype)
            copies[index] = guards[index].tensor.copy_(leaf)
    yield tree_unflatten(copies, structure)
    for index, guard in guards.items():
        guard.check(f"input {index}")
        if not torch.equal(guard.tensor, leaves[index]):
            raise AssertionError(f"input {index}: was modified")


@contextmanager
def guarded_outputs(monkeypatch: Any) -> Iterator[list[Guarded]]:
    """Put what `Tensor.new_empty_strided` returns among sentinels; yield the list of these.

    Kernels get their outputs from there (`evsam_kernels/ops/layout.py`).

    Raises:
        AssertionError: on leaving, if anything was written outside one of them.
    """
    guards: list[Guarded] = []

    def new_empty_strided(like: Tensor, size: Any, stride: Any) -> Tensor:
        guards.append(Guarded(size, stride, like.dtype))
        return guards[-1].tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty_strided", new_empty_strided)
        yield guards
    for index, guard in enumerate(guards):
        guard.check(f"output {index}")
