"""Launches the C++ kernels of the stages; shapes are those of `reference.py`."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from evsam_kernels.ops.native import address, dtype_name, native, packed
from evsam_kernels.ops.shared_mask_decoder.reference import (
    Basis,
    Linear,
    Norm,
    SharedMap,
    Upscaling,
    Values,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_POSITIONS = 64  # Of a tile, which the kernels are compiled for.
_LINE = 16  # Elements of a cache line.


class Memory:
    """Room for the results of an image's prompts, which is used again once no tensor refers to it.

    A tensor begins at a cache line.
    """

    def __init__(self) -> None:
        # As much as is in use at once: vectors and scales of two bases, and masks.
        self._free: deque[NDArray[np.float32]] = deque(maxlen=5)

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        """A float32 tensor."""
        count = math.prod(shape)
        room = self._take(count + _LINE)
        start = -room.ctypes.data // room.itemsize % _LINE
        array = room[start : start + count]
        weakref.finalize(array, self._free.append, room).atexit = False
        return torch.from_numpy(array).view(shape)

    def _take(self, count: int) -> NDArray[np.float32]:
        free = []
        while self._free:
            try:
                free.append(self._free.popleft())
            except IndexError:  # Another thread was faster.
                break
        free.sort(key=len)
        chosen = next((room for room in free if count <= len(room) <= 2 * count), None)
        self._free.extend(room for room in free if room is not chosen)
        if chosen is not None:
            return chosen
        # NumPy asks the system for huge pages, which PyTorch does not: a fault for every 4 KiB
        # takes longer than to write them.
        return np.empty(count, np.float32)


def tiled(x: Tensor) -> Tensor:
    """`[..., N]` -> `[tiles, ..., 64]`, filled up with zeros."""
    missing = -x.shape[-1] % _POSITIONS
    filled = F.pad(x, (0, missing)) if missing else x
    return filled.unflatten(-1, (-1, _POSITIONS)).movedim(-2, 0).contiguous()


def feed_forward(
    layers: Sequence[Linear],
    x: Tensor,
    residual: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    """See `reference.feed_forward`."""
    y = native().feed_forward(
        layers=[packed(layer, ("linear",), _pack) for layer in layers],
        x=_array(x.flatten(0, -2)),
        residual=None if residual is None else _array(residual.flatten(0, -2)),
        norm_weight=None if norm is None else _array(norm.weight.detach()),
        norm_bias=None if norm is None else _array(norm.bias.detach()),
        eps=0.0 if norm is None else norm.eps,
        num_threads=torch.get_num_threads(),
    )
    return torch.from_numpy(y).unflatten(0, x.shape[:-1])


def attend_tokens(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """See `reference.attend_tokens`."""
    y = native().attend_tokens(
        queries=_array(queries),
        keys=_array(keys),
        values=_array(values),
        heads=heads,
        num_threads=torch.get_num_threads(),
    )
    return torch.from_numpy(y)


def map_values(values: Sequence[Values], tables: Sequence[Tensor], groups: int) -> Tensor:
    """See `reference.map_values`."""
    rows = native().map_values(
        values=[
            (_array(of.differences), _array(of.last), _array(table))
            for of, table in zip(values, tables, strict=True)
        ],
        groups=groups,
        num_threads=torch.get_num_threads(),
    )
    return torch.from_numpy(rows)


def attend_keys(
    queries: Tensor,
    keys: SharedMap,
    values: Tensor,
    basis: Basis | None,
    row_queries: Tensor | None,
    positions: int,
) -> tuple[Tensor, Tensor]:
    """See `reference.attend_keys`."""
    shared, of_basis = native().attend_keys(
        queries=_array(queries),
        keys=_array(keys.base),
        values=_array(values),
        offsets=_optional(keys.offsets),
        scales=None if basis is None else _array(basis.scales),
        basis=None if basis is None else _array(basis.vectors),
        row_queries=_optional(row_queries),
        positions=positions,
        num_threads=torch.get_num_threads(),
    )
    return torch.from_numpy(shared), torch.from_numpy(of_basis)


def update_keys(
    tokens: Tensor,
    queries: SharedMap,
    basis: Basis | None,
    row_tokens: Tensor | None,
    values: Sequence[Values],
    features: Sequence[Tensor],
    norm: Norm,
    rows: Tensor,
    memory: Memory,
) -> Basis:
    """See `reference.update_keys`."""
    batch, rank = rows.shape[:2]
    tiles = len(norm.base)
    result = Basis(
        memory.empty(batch, tiles, rank, _POSITIONS, like=rows),
        memory.empty(batch, tiles, _POSITIONS, like=rows),
    )
    native().update_keys(
        tokens=_array(tokens),
        queries=_array(queries.base),
        offsets=_optional(queries.offsets),
        scales=None if basis is None else _array(basis.scales),
        basis=None if basis is None else _array(basis.vectors),
        row_tokens=_optional(row_tokens),
        updates=[
            (_array(of.differences), _array(of.last), _array(of_block))
            for of, of_block in zip(values, features, strict=True)
        ],
        square=_array(norm.square),
        base=_array(norm.base),
        rows=_array(rows),
        new_basis=result.vectors.numpy(),
        new_scales=result.scales.numpy(),
        eps=norm.eps,
        num_threads=torch.get_num_threads(),
    )
    return result


def upscale_masks(
    base: Tensor,
    basis: Basis,
    rows: Tensor,
    upscaling: Upscaling,
    vectors: Tensor,
    counts: Tensor,
    masks: Tensor,
) -> None:
    """See `reference.upscale_masks`."""
    native().upscale_masks(
        base=_array(base),
        scales=_array(basis.scales),
        basis=_array(basis.vectors),
        rows=_array(rows),
        offsets=_array(upscaling.offsets),
        norm_weight=_array(upscaling.norm_weight),
        norm_bias=_array(upscaling.norm_bias),
        eps=upscaling.eps,
        weight=_array(upscaling.weight),
        bias=_array(upscaling.bias),
        first=_array(F.pad(counts.cumsum(0), (1, 0))),
        vectors=_array(vectors.mT),
        masks=masks.numpy(),
        height=masks.shape[1] // 4,
        width=masks.shape[2] // 4,
        bfloat16=upscaling.dtype == torch.bfloat16,
        num_threads=torch.get_num_threads(),
    )


def _pack(weight: Tensor, bias: Tensor | None) -> Any:
    out_columns, in_columns = weight.shape
    return native().pack_conv_act(
        weight=address(weight),
        bias=address(bias),
        in_channels=in_columns,
        out_channels=out_columns,
        kernel=1,
        stride=1,
        dilation=1,
        groups=1,
        dtype=dtype_name(weight),
    )


def _array(tensor: Tensor) -> Any:
    return tensor.contiguous().numpy()


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else _array(tensor)
