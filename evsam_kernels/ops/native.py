"""What the launchers of C++ kernels share: addresses, names of dtypes, packed weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from evsam_kernels.ops.layout import channels_last


def native() -> ModuleType:
    """The extension module, imported when first needed: the package works without it."""
    from evsam_kernels import _cpu

    return _cpu


def address(tensor: Tensor | None) -> int | None:
    """Address of the first element of a dense tensor; None for None."""
    return None if tensor is None else tensor.data_ptr()


def dtype_name(tensor: Tensor) -> str:
    """Name of the tensor's dtype as the extension module knows it."""
    return str(tensor.dtype).removeprefix("torch.")


def large_maps(height: int, width: int) -> bool:
    """Whether maps of that size are large to convolutions; see `csrc/include/evsam/conv_act.h`."""
    return height * width >= 32 * 32


def check_inputs(
    op: str, accepted: Sequence[torch.dtype], x: Tensor, *others: Tensor | None
) -> None:
    """Check dtype and device of a launcher's tensors.

    Raises:
        TypeError: `x` has a dtype without a kernel.
        ValueError: a tensor is not on the CPU.
    """
    if x.dtype not in accepted:
        names = ", ".join(map(str, accepted))
        raise TypeError(
            f"{op}: the cpu backend takes {names}, got {x.dtype}; choose backend='reference'"
        )
    for tensor in (x, *others):
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(
                f"{op}: the cpu backend takes tensors on the CPU, got one on {tensor.device}; "
                f"move it with .cpu()"
            )


def dense_residual(residual: Tensor | None) -> Tensor | None:
    """The residual in dense NHWC."""
    return None if residual is None else channels_last(residual)


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


_packed: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def packed(
    weights: Sequence[Tensor | None], settings: tuple[Any, ...], pack: Callable[..., Any]
) -> Any:
    """What `pack(*weights)` returns for contiguous weights, made once and kept with the first one.

    Made anew when a weight was replaced or changed in place in a way that autograd notices too, or
    when another instruction set is in use. Inference tensors do not tell when they are changed:
    their packed form is not kept.

    Args:
        weights: the tensors it is made from; the first is there.
        settings: whatever else it depends on.
        pack: makes it.
    """
    tensors = [weight for weight in weights if weight is not None]
    contiguous = [None if weight is None else weight.contiguous() for weight in weights]
    if any(tensor.is_inference() for tensor in tensors):
        return pack(*contiguous)
    key = (native().isa(), *(weight is None for weight in weights), *settings)
    with _lock:
        kept = _packed.setdefault(tensors[0], {})
        states, result = kept.get(key, ((), None))
        current = len(states) == len(tensors) and all(
            state.describes(tensor) for state, tensor in zip(states, tensors, strict=True)
        )
        if not current:
            states = [_State(tensor) for tensor in tensors]
            result = pack(*contiguous)
            # What other instruction sets and values have left behind is of no more use.
            for other, ((first, *_), _) in list(kept.items()):
                if other[0] != key[0] or not first.describes(tensors[0]):
                    del kept[other]
            kept[key] = (states, result)
    return result
