"""What is made of tensors once and kept for as long as they are there and unchanged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary


class _State:
    """Tells whether a tensor still holds the values it held."""

    def __init__(self, tensor: Tensor) -> None:
        # A weak reference keeps the number of a storage that is gone from being used again.
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = self._layout_of(tensor)
        self._version = tensor._version

    @staticmethod
    def _layout_of(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def describes(self, tensor: Tensor) -> bool:
        return (
            self._storage.cdata == tensor.untyped_storage()._cdata
            and self._layout == self._layout_of(tensor)
            and self._version == tensor._version
        )


_kept: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def kept(tensors: Sequence[Tensor], key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make()` returns, made once and kept with the first tensor.

    Made anew when a tensor was replaced or changed in place in a way that autograd notices too, or
    when the first of `key` changes. Inference tensors do not tell when they are changed: what is
    made of them is not kept.

    Args:
        tensors: what it is made from, at least one. It must not hold the first of them itself.
        key: whatever else it depends on.
        make: makes it.
    """
    if any(tensor.is_inference() for tensor in tensors):
        return make()
    with _lock:
        of_first = _kept.setdefault(tensors[0], {})
        states, result = of_first.get(key, ((), None))
        current = len(states) == len(tensors) and all(
            state.describes(tensor) for state, tensor in zip(states, tensors, strict=True)
        )
        if not current:
            states = [_State(tensor) for tensor in tensors]
            result = make()
            # What other instruction sets and values have left behind is of no more use.
            for other, ((first, *_), _) in list(of_first.items()):
                if other[0] != key[0] or not first.describes(tensors[0]):
                    del of_first[other]
            of_first[key] = (states, result)
    return result
