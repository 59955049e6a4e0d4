"""What is made of tensors once and kept for as long as they are there and unchanged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakTensorKeyDictionary


class _Kept(NamedTuple):
    """Something and what it was made of.

    Attributes:
        states: of the tensors.
        storages: theirs, as no others can be where these are as long as they are held.
        result: what was made.
    """

    states: list[tuple[Any, ...]]
    storages: list[UntypedStorage]
    result: Any


_kept: Any = WeakTensorKeyDictionary()
# What is made may be made of something that is kept itself.
_lock = threading.RLock()


def kept(tensors: Sequence[Tensor], key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make()` returns, made once and kept with the first tensor.

    Made anew when a tensor was replaced, moved or changed in place in a way that autograd notices
    too, or when the first of `key` changes. Inference tensors do not tell when they are changed:
    what is made of them is not kept.

    Args:
        tensors: what it is made from, at least one. It must not hold the first of them itself.
        key: whatever else it depends on.
        make: makes it.
    """
    try:
        states = [(x.data_ptr(), x._version, x.dtype, x.shape, x.stride()) for x in tensors]
    except RuntimeError:  # Of a tensor that does not tell.
        return make()
    with _lock:
        of_first = _kept.setdefault(tensors[0], {})
        found = of_first.get(key)
        if found is None or found.states != states:
            storages = [tensor.untyped_storage() for tensor in tensors]
            found = _Kept(states, storages, make())
            # What other instruction sets and values have left behind is of no more use.
            for other, ((first, *_), *_) in list(of_first.items()):
                if other[0] != key[0] or first != states[0]:
                    del of_first[other]
            of_first[key] = found
    return found.result
