"""Launches kernels of the C++ backend, and launches again what a module has launched before.

What Python checks, looks up and allocates between two kernels takes little time as such, but a
kernel leaves none of it in the caches. A module that always launches the same needs it once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from evsam_kernels.ops.kept import kept
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.native import native
from evsam_kernels.simt import emulation


class Maps(list[Tensor]):
    """Several maps that are one argument."""


_ALIGNMENT = 64  # Bytes, of maps that are not returned.
_CACHED = 16 << 20  # Bytes of maps that caches are taken to hold.
_THREADS_OF_AN_IMAGE = 4  # That one image is taken to have enough work for.
_ATTRIBUTES_OF_ALL = len(vars(nn.Module()))
_PLAIN = (bool, int, float, str, tuple, type(None))

_current = threading.local()


def launch(name: str, maps: dict[str, Tensor | Maps | None], y: Tensor, **arguments: Any) -> Tensor:
    """Run a kernel of the extension module.

    Args:
        name: of the kernel.
        maps: what it reads, by the names of its arguments: dense NHWC tensors.
        y: what it writes, likewise.
        arguments: all others. A tensor is passed by its address, too, and belongs to the weights.

    Returns:
        `y`.
    """
    kernel = getattr(native(), name)
    recorder: _Recorder | None = getattr(_current, "recorder", None)
    if recorder is not None:
        recorder.add(kernel, maps, y, arguments)
    kernel(y=y.data_ptr(), **_by_address(maps), **_by_address(arguments))
    return y


def replayed(
    owner: nn.Module, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """`run(*inputs)`; from the second time on only the kernels that it has launched the first time.

    Of a large batch only as many images at a time are taken as have maps that caches hold and work
    for all threads.

    Other shapes, dtypes, weights, settings, numbers of threads and instruction sets have a first
    time of their own. `run` is called every time where someone could tell the difference: with
    gradients, hooks on modules inside `owner`, `torch.compile`, modes, transforms and profiles.

    Args:
        owner: holds all weights and settings that `run` reads, in itself or modules inside, which
            say of themselves that they are for this: `only_launches`.
        run: takes maps `[B, C, H, W]` and returns such, made by nothing but `launch`.
        inputs: its arguments.
    """
    if (
        torch.compiler.is_compiling()
        or getattr(_current, "recorder", None) is not None
        or _is_watched(inputs)
    ):
        return run(*inputs)
    inside = list(_inside(owner))
    if not all(map(only_launches, inside[1:])):
        return run(*inputs)
    weights = [tensor for module in inside for tensor in _tensors(module)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *weights)):
        return run(*inputs)
    inputs = [channels_last(x) for x in inputs]
    settings = [setting for module in inside for setting in _settings(module)]
    threads = torch.get_num_threads()

    def recording_for(
        inputs: Sequence[Tensor],
    ) -> tuple[_Recording | None, Sequence[Tensor] | None]:
        """The recording, and the results if this was the first time."""
        first: list[Sequence[Tensor]] = []

        def record() -> _Recording | None:
            recorder = _Recorder(inputs)
            _current.recorder = recorder
            try:
                first.append(run(*inputs))
            finally:
                _current.recorder = None
            # Maps of the first time lay one by one between weights that are packed.
            native().trim()
            return recorder.recording(first[0])

        of_inputs = [(x.shape, x.dtype) for x in inputs]
        key = (native().isa(), "recording", threads, *of_inputs, *settings)
        recording: _Recording | None = kept(weights, key, record)
        return recording, first[0] if first else None

    recording, results = recording_for(inputs)
    if results is not None:
        return results
    if recording is None:
        return run(*inputs)
    results = recording.results_for(inputs)
    at_once = recording.images_at_once(threads)
    if at_once >= len(inputs[0]):
        recording.replay(inputs, results)
        return results
    for maps in zip(*(map_.split(at_once) for map_ in (*inputs, *results)), strict=True):
        part, of_part = maps[: len(inputs)], maps[len(inputs) :]
        recording, made = recording_for(part)
        if recording is not None and made is None:
            recording.replay(part, of_part)
        else:
            for result, map_ in zip(of_part, made or run(*part), strict=True):
                result.copy_(map_)
    return results


def _by_address(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the address of every tensor in its place."""
    return {
        key: value.data_ptr()
        if isinstance(value, Tensor)
        else [each.data_ptr() for each in value]
        if isinstance(value, Maps)
        else value
        for key, value in arguments.items()
    }


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all inside it, in a fixed order."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _inside(child)


def _tensors(module: nn.Module) -> list[Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def _settings(module: nn.Module) -> list[Any]:
    # What every module has comes first.
    own = itertools.islice(vars(module).values(), _ATTRIBUTES_OF_ALL, None)
    return [type(module), *[value for value in own if type(value) in _PLAIN]]


def only_launches(module: nn.Module) -> bool:
    """Whether the module does nothing but launch kernels, or is a mere container."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    containers = (nn.ModuleList, nn.ParameterList)
    return isinstance(module, containers) or getattr(module, "only_launches", False)


def _is_watched(inputs: Sequence[Tensor]) -> bool:
    """Whether operators called with these would be seen, or other than computed on the CPU."""
    return (
        torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or bool(nn.modules.module._global_forward_hooks)
        or bool(nn.modules.module._global_forward_pre_hooks)
        or emulation.current() is not None
        or any(
            type(x) is not Tensor
            or x.device.type != "cpu"
            or x.dim() != 4
            or x.numel() == 0
            or x.is_neg()
            for x in inputs
        )
    )


class _Step(NamedTuple):
    """A launch, with maps by their numbers.

    Attributes:
        kernel: of the extension module.
        maps: what it reads, by the names of its arguments.
        y: what it writes.
        arguments: all others.
    """

    kernel: Callable[..., None]
    maps: list[tuple[str, int | list[int]]]
    y: int
    arguments: dict[str, Any]

    def reads(self) -> Iterator[int]:
        """Numbers of the maps that it reads."""
        for _, map_ in self.maps:
            yield from map_ if isinstance(map_, list) else [map_]


class _Map(NamedTuple):
    """A map, which may be gone.

    Attributes:
        shape: of it.
        nbytes: the memory it takes.
        storage: a weak reference, which keeps the number of one that is gone from reuse.
    """

    shape: torch.Size
    nbytes: int
    storage: StorageWeakRef


@dataclass(eq=False)
class _Piece:
    """Of memory for maps, for one or several that take its place in turn.

    Attributes:
        size: of it, in bytes.
        first, last: launches that write and read it.
        begin: where it lies, in bytes.
    """

    size: int
    first: int
    last: int = 0
    begin: int = 0


class _Recorder:
    """Writes down launches. The inputs are maps 0, 1, ...; every launch makes the next."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.dtype = inputs[0].dtype
        self.maps: list[_Map] = []
        self.numbers: dict[tuple[int, int], int] = {}
        for x in inputs:
            self._add_map(x)
        self.inputs = len(inputs)
        self.steps: list[_Step] = []
        self.knows_all = True

    def add(
        self,
        kernel: Callable[..., None],
        maps: dict[str, Tensor | Maps | None],
        y: Tensor,
        arguments: dict[str, Any],
    ) -> None:
        found: list[tuple[str, int | list[int]]] = []
        fixed = dict(arguments)
        for key, value in maps.items():
            if value is None:
                fixed[key] = None
            elif isinstance(value, Tensor):
                found.append((key, self._number(value)))
            else:
                found.append((key, [self._number(each) for each in value]))
        self.knows_all = self.knows_all and y.dtype == self.dtype
        self.steps.append(_Step(kernel, found, len(self.maps), fixed))
        self._add_map(y)

    def _add_map(self, x: Tensor) -> None:
        storage = StorageWeakRef(x.untyped_storage())
        self.numbers[storage.cdata, x.data_ptr()] = len(self.maps)
        self.maps.append(_Map(x.shape, x.numel() * x.element_size(), storage))

    def _number(self, x: Tensor) -> int:
        number = self.numbers.get((x.untyped_storage()._cdata, x.data_ptr()), -1)
        self.knows_all = self.knows_all and number >= 0
        return number

    def recording(self, results: Sequence[Tensor]) -> _Recording | None:
        """How to make `results` again; None if not only launches have made them."""
        numbers = [self._number(result) for result in results]
        made = range(self.inputs, len(self.maps))
        if not self.knows_all or not all(number in made for number in numbers):
            return None
        launches, held = native().Launches(), []
        for step in self.steps:
            # What is kept with weights must not hold them.
            arguments = {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in step.arguments.items()
            }
            maps = {
                key: [launches.stand_in(each) for each in map_]
                if isinstance(map_, list)
                else launches.stand_in(map_)
                for key, map_ in step.maps
            }
            step.kernel(
                **maps, y=launches.stand_in(step.y), **_by_address(arguments), later=launches
            )
            held.append(arguments)
        places, size = self._places(numbers)
        shapes = {number: self.maps[number].shape for number in numbers}
        return _Recording(launches, [places.get(n, 0) for n in made], size, numbers, shapes, held)

    def _places(self, results: Sequence[int]) -> tuple[dict[int, int], int]:
        """Where in one piece of memory maps lie that are not returned, and its size in bytes.

        Pieces are placed from the largest to the smallest, each as far in front as those leave room
        that are needed at the same time (Pisarchyk and Lee, arXiv 2001.03288).
        """
        last_use = {step.y: index for index, step in enumerate(self.steps)}
        for index, step in enumerate(self.steps):
            last_use.update(dict.fromkeys(step.reads(), index))
        piece_of: dict[int, _Piece] = {}
        for index, step in enumerate(self.steps):
            if step.y in results:
                continue
            residual = dict(step.maps).get("residual")
            if (
                residual in piece_of
                and last_use[residual] == index
                and list(step.reads()).count(residual) == 1
            ):
                # A kernel reads what it adds just before it writes the sum.
                piece = piece_of[residual]
            else:
                size = -(-self.maps[step.y].nbytes // _ALIGNMENT) * _ALIGNMENT
                piece = _Piece(size, index)
            piece.last = last_use[step.y]
            piece_of[step.y] = piece
        placed: list[_Piece] = []
        for piece in sorted(set(piece_of.values()), key=lambda each: (-each.size, each.first)):
            for other in sorted(placed, key=lambda each: each.begin):
                if other.first <= piece.last and piece.first <= other.last:
                    if other.begin >= piece.begin + piece.size:
                        break
                    piece.begin = max(piece.begin, other.begin + other.size)
            placed.append(piece)
        size = max((piece.begin + piece.size for piece in placed), default=0)
        return {map_: piece.begin for map_, piece in piece_of.items()}, size


class _Recording(NamedTuple):
    """Launches that can be repeated with other inputs of the same shapes.

    Attributes:
        launches: the launches.
        places: of the maps that they make, in bytes from the beginning of `size` bytes; of those
            that are returned anything.
        size: of the memory for these.
        results: the maps that are returned.
        shapes: of these.
        held: what launches read besides maps.
    """

    launches: Any
    places: list[int]
    size: int
    results: list[int]
    shapes: dict[int, torch.Size]
    held: list[dict[str, Any]]

    def images_at_once(self, threads: int) -> int:
        """How many images of the batch to take together."""
        images = self.shapes[self.results[0]][0]
        cached = _CACHED * images // max(self.size, 1)
        return max(cached, -(-threads // _THREADS_OF_AN_IMAGE))

    def results_for(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Room for what the inputs give."""
        made = {
            number: empty_channels_last(inputs[0], shape) for number, shape in self.shapes.items()
        }
        return [made[number] for number in self.results]

    def replay(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Write what the inputs give; all are dense NHWC."""
        begin = self.launches.memory(self.size)
        addresses = [*(x.data_ptr() for x in inputs), *(begin + place for place in self.places)]
        for number, result in zip(self.results, results, strict=True):
            addresses[number] = result.data_ptr()
        self.launches.run(addresses)
