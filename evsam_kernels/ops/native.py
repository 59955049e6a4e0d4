"""What the launchers of C++ kernels share: addresses, names of dtypes, packed weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from evsam_kernels.ops.kept import kept
from evsam_kernels.ops.layout import channels_last


@functools.cache
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


def packed(
    weights: Sequence[Tensor | None], settings: tuple[Any, ...], pack: Callable[..., Any]
) -> Any:
    """What `pack(*weights)` returns for contiguous weights, made once for an instruction set.

    Args:
        weights: the tensors it is made from; the first is there.
        settings: whatever else it depends on.
        pack: makes it.
    """
    return kept(
        [weight for weight in weights if weight is not None],
        (native().isa(), *(weight is None for weight in weights), *settings),
        lambda: pack(*(None if weight is None else weight.contiguous() for weight in weights)),
    )
