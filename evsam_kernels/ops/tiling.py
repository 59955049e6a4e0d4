"""Which tile a Triton kernel takes for a layer: a measured one, the table's, or the rule's.

The table, tiling.json, has tiles that replays estimate to be faster than those of the kernels' own
rules; `python -m bench tiles` makes it. With EVSAM_AUTOTUNE=1 the first call of every layer shape
on a GPU times the tiles there are instead, and a file in the user's cache folder keeps the best.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evsam_kernels.ops.gpu import limits

VARIABLE = "EVSAM_AUTOTUNE"

_TABLE = Path(__file__).with_suffix(".json")
_TABLE_DTYPES = (torch.float16, torch.bfloat16)
_ROUNDS, _LAUNCHES = 5, 10

Timer = Callable[[Callable[[], object]], float]
"""Calls what launches a kernel, and returns the seconds that it takes."""


class Tile(NamedTuple):
    """A block's share of a product, and how it is computed.

    Attributes:
        bm, bn, bk: rows, columns and the part of the sum that is loaded at once.
        warps: of a block.
        stages: of the software pipeline.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


class Layer(NamedTuple):
    """What the choice of a tile depends on.

    Attributes:
        operation: whose kernel it is.
        dtype: of the maps.
        channels: of the input, of what lies between where anything does, and of the result.
        kernel, stride: of the convolution.
        pixels: of the result, of all images together.
    """

    operation: str
    dtype: torch.dtype
    channels: tuple[int, ...]
    kernel: int
    stride: int
    pixels: int


def enabled() -> bool:
    """Whether EVSAM_AUTOTUNE asks for tiles to be timed.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    setting = os.environ.get(VARIABLE, "0")
    if setting not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {setting!r}")
    return setting == "1"


def choose(
    layer: Layer,
    by_rule: Tile,
    others: Sequence[Tile],
    on: Tensor,
    launch: Callable[[Tile], object],
    unfit: type[Exception],
) -> Tile:
    """The tile for a layer.

    Args:
        layer: to choose for.
        by_rule: what it is where nothing is known of the layer.
        others: worth timing as well.
        on: a tensor on the GPU, real or emulated.
        launch: runs the kernel with a tile; what it writes does not matter.
        unfit: what `launch` raises for tiles that the GPU has no room for.

    Raises:
        ValueError: EVSAM_AUTOTUNE is neither 0 nor 1.
    """
    measurements = _measurements.get()
    if measurements is None and enabled() and on.is_cuda:
        measurements = _of_gpu(torch.cuda.get_device_name(on.device))
    if measurements is not None:
        found = measurements.best(layer, [by_rule, *others], launch, unfit)
        if found is not None:
            return found
    known = table().get((limits(on).arch, layer.operation, *layer[2:5]), ())
    if layer.dtype in _TABLE_DTYPES:
        for least_pixels, tile in known:
            if layer.pixels >= least_pixels:
                return tile
    return by_rule


class Entry(NamedTuple):
    """A row of the table.

    Attributes:
        operation, channels, kernel, stride: as of `Layer`.
        least_pixels: from how many on it holds.
        architectures: compute capabilities where the tile fits and spills no registers.
        tile: to take.
        estimate_us, by_rule_us: estimates, uncalibrated, with this tile and with the rule's; None
            where the rule's spills registers.
    """

    operation: str
    channels: tuple[int, ...]
    kernel: int
    stride: int
    least_pixels: int
    architectures: tuple[int, ...]
    tile: Tile
    estimate_us: float
    by_rule_us: float | None


def entries() -> list[Entry]:
    """The table's rows."""
    rows = json.loads(_TABLE.read_text(encoding="utf-8"))["tiles"]
    return [
        Entry(
            **{
                **{name: _hashable(value) for name, value in row.items()},
                "tile": Tile(*row["tile"]),
            }
        )
        for row in rows
    ]


@functools.cache
def table() -> dict[tuple[Any, ...], list[tuple[int, Tile]]]:
    """Tiles and from how many pixels on they hold, most first, by architecture and layer."""
    found: dict[tuple[Any, ...], list[tuple[int, Tile]]] = {}
    for entry in entries():
        for arch in entry.architectures:
            found.setdefault((arch, *entry[:4]), []).append((entry.least_pixels, entry.tile))
    return {key: sorted(tiles, reverse=True) for key, tiles in found.items()}


class Measurements:
    """What tiles of layers take, by a timer, and the best of them."""

    def __init__(self, timer: Timer, path: Path | None = None) -> None:
        """Start with what the file at `path` has, and add to it; None for no file."""
        self.seconds: dict[Layer, dict[Tile, float]] = {}
        self._timer = timer
        self._path = path
        self._best: dict[Layer, Tile] = {} if path is None else _read(path)
        self._lock = threading.Lock()

    def best(
        self,
        layer: Layer,
        tiles: Sequence[Tile],
        launch: Callable[[Tile], object],
        unfit: type[Exception],
    ) -> Tile | None:
        """The fastest tile, timed once for each layer; None where that cannot be found out now."""
        with self._lock:
            if layer not in self._best:
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    return None  # What is captured does not run.
                seconds: dict[Tile, float] = {}
                for tile in dict.fromkeys(tiles):
                    try:
                        seconds[tile] = self._timer(functools.partial(launch, tile))
                    except unfit:
                        continue
                if not seconds:
                    return None
                self.seconds[layer] = seconds
                self._best[layer] = min(seconds, key=lambda tile: seconds[tile])
                if self._path is not None:
                    _write(self._path, self._best)
            return self._best[layer]


_measurements: ContextVar[Measurements | None] = ContextVar("measurements", default=None)


@contextmanager
def measuring(timer: Timer) -> Iterator[Measurements]:
    """Choose tiles by a timer in the block, whatever EVSAM_AUTOTUNE says."""
    measurements = Measurements(timer)
    token = _measurements.set(measurements)
    try:
        yield measurements
    finally:
        _measurements.reset(token)


@functools.cache
def _of_gpu(name: str) -> Measurements:
    return Measurements(gpu_seconds, cache_file(name))


def cache_file(gpu: str) -> Path:
    """Where the tiles that were timed on a GPU are kept, for this Triton and this package."""
    versions = (_version("triton"), _version("evsam-kernels"))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "evsam_kernels")
    return folder / (re.sub(r"[^\w.+]+", "-", "-".join(("tiles", gpu, *versions))) + ".json")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def gpu_seconds(launch: Callable[[], object]) -> float:
    """Seconds of a launch on PyTorch's current GPU: the least mean of a few rounds."""
    launch()  # Compiles.
    rounds = []
    for _ in range(_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_LAUNCHES):
            launch()
        stop.record()
        stop.synchronize()
        rounds.append(start.elapsed_time(stop) / 1e3 / _LAUNCHES)
    return min(rounds)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read(path: Path) -> dict[Layer, Tile]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {
            Layer(operation, getattr(torch, dtype), *map(_hashable, rest)): Tile(*tile)
            for (operation, dtype, *rest), tile in rows
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # There is none yet, or one that nobody can use.


def _write(path: Path, best: dict[Layer, Tile]) -> None:
    """Write a file at once, with what other processes have found meanwhile."""
    rows = [
        ((layer.operation, str(layer.dtype).removeprefix("torch."), *layer[2:]), tile)
        for layer, tile in {**_read(path), **best}.items()
    ]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        warnings.warn(f"{path}: tiles that were timed cannot be kept: {error}", stacklevel=2)
