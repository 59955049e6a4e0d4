"""`evsam inspect --model`: every layer of a model's encoder, counted without a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import evsam_kernels
from evsam_kernels import simt
from evsam_kernels.backends import AUTO, BackendUnavailableError
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.output import progress, write_atomically
from evsam_kernels.nn.folded import FoldedBlock
from evsam_kernels.ops.layout import channels_last_strides
from evsam_kernels.ops.registry import NAMESPACE, tensors_of
from evsam_kernels.sam.zoo import VARIANTS, create_efficientvit_sam_model
from evsam_kernels.simt.replay import constants

DTYPES = ("float16", "bfloat16", "float32")
_PIPED_WIDTH = 200
_ALIGNMENT = 512

_TENSOR_RATES = {
    torch.float16: "tensor f16",
    torch.bfloat16: "tensor bf16",
    torch.float32: "tensor tf32",
}


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        path: the module that made it.
        operation: its name, such as "conv_act".
        arguments: what it was called with.
        output: `[B, C, H, W]` of its result.
        call: runs it.
    """

    path: str
    operation: str
    arguments: tuple[Any, ...]
    output: tuple[int, ...]
    call: Callable[..., Tensor]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that do the same work."""
        return (self.operation, *map(_key, self.arguments))

    @property
    def shapes(self) -> str:
        """The map that goes in first, and the one that comes out."""
        first = tensors_of(self.arguments)[0]
        return " -> ".join("x".join(map(str, shape)) for shape in (first.shape, self.output))

    def ideal(self, gpu: simt.Gpu) -> float:
        """Seconds at the published peak of what limits it: tensor cores, or moving each byte once.

        That is its operands, once each, and its result.
        """
        tensors = {t.data_ptr(): t for t in tensors_of(self.arguments)}.values()
        dtype = tensors_of(self.arguments)[0].dtype
        moved = sum(t.numel() * t.element_size() for t in tensors)
        moved += math.prod(self.output) * dtype.itemsize
        peak = gpu.rates[_TENSOR_RATES[dtype]].per_second
        operations = flops(self.operation, self.arguments, self.output)
        return max(operations / peak, moved / gpu.rates["DRAM"].per_second)


def _key(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return (tuple(argument.shape), argument.dtype)
    return tuple(map(_key, argument)) if isinstance(argument, (list, tuple)) else argument


def flops(operation: str, operands: Sequence[Any], output: Sequence[int]) -> int:
    """Floating-point operations of an operation's matrix products and convolutions.

    A multiply-add is two. What is neither, as normalisation and interpolation, counts none: it does
    not run on tensor cores, and moving its maps takes longer.

    Args:
        operation: its name.
        operands: without the backend.
        output: `[B, C, H, W]` of the result.
    """
    batch, _, height, width = operands[0].shape if isinstance(operands[0], Tensor) else output
    pixels_in = batch * height * width
    pixels_out = output[0] * output[2] * output[3]
    if operation == "conv_act":
        return 2 * pixels_out * operands[1].numel()
    if operation == "fused_mbconv":
        return 2 * pixels_out * (operands[1].numel() + operands[3].numel())
    if operation == "mbconv":
        inside = operands[3].numel() + operands[5].numel()
        return 2 * (pixels_in * operands[1].numel() + pixels_out * inside)
    if operation == "relu_linear_attention":
        return _attention_flops(pixels_in, operands[0].shape[1] // 3, operands[1])
    if operation == "multi_scale_attention":
        weights = tensors_of([operands[1], operands[3], operands[5], operands[7]])
        attention = _attention_flops(pixels_in, operands[7].shape[1], operands[10])
        return 2 * pixels_in * sum(weight.numel() for weight in weights) + attention
    return 0


def _attention_flops(pixels: int, channels: int, head_dim: int) -> int:
    """Of k^T [v, 1] and of q times that, for `channels` of q, k and v each."""
    return 2 * 2 * pixels * channels * (head_dim + 1)


@dataclass(frozen=True)
class LaunchRow:
    """What is known of one launch.

    Attributes:
        kernel, grid, block, shared: as launched; shared is dynamic memory in bytes.
        registers, spilled: per thread, spilled in bytes.
        blocks_at_once: that a multiprocessor holds.
        bound_seconds, bound_by: it takes no less.
        estimate_seconds: uncalibrated.
        doubtful: kinds of instructions that the estimate has more or less of than were counted.
        sectors, ideal_sectors: of global and local memory that requests touch, and that would hold
            the bytes.
        wavefronts, ideal_wavefronts: of shared memory, and without bank conflicts.
        moved: bytes of global memory that have to move even if caches are perfect.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    registers: int
    spilled: int
    blocks_at_once: int
    bound_seconds: float
    bound_by: str
    estimate_seconds: float
    doubtful: tuple[str, ...]
    sectors: float
    ideal_sectors: float
    wavefronts: float
    ideal_wavefronts: float
    moved: float


@dataclass(frozen=True)
class Layer:
    """A call of an operation with what is known of its launches.

    Attributes:
        paths: modules that make the same call, one entry for each time.
        operation, shapes: what is called, on what.
        ideal_seconds: at the published peaks.
        launches: what it launches.
    """

    paths: tuple[str, ...]
    operation: str
    shapes: str
    ideal_seconds: float
    launches: tuple[LaunchRow, ...]

    @property
    def bound_seconds(self) -> float:
        """No call takes less with these kernels."""
        return sum(launch.bound_seconds for launch in self.launches)

    @property
    def estimate_seconds(self) -> float:
        """What a call may take, uncalibrated."""
        return sum(launch.estimate_seconds for launch in self.launches)


class _Recorder(TorchDispatchMode):
    """Notes calls of operations, and answers with zeros instead of computing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._path: list[str] = []
        self._model = model

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        operation = func._schema.name.partition("::")[2]
        meta = func(*(_to_meta(argument) for argument in args))
        result = zeros(tuple(meta.shape), meta.dtype)
        path = self._path[-1] if self._path else ""
        self.calls.append(Call(path, operation, tuple(args[:-1]), tuple(meta.shape), func))
        return result

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = []
        for name, module in self._model.named_modules():
            if isinstance(module, FoldedBlock):
                enter = module.register_forward_pre_hook(lambda *_, n=name: self._path.append(n))
                handles += [enter, module.register_forward_hook(lambda *_: _pop(self._path))]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _pop(path: list[str]) -> None:
    path.pop()


def _to_meta(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.to("meta")
    return [_to_meta(item) for item in argument] if isinstance(argument, list) else argument


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A dense NHWC map of zeros, which takes memory only where it is used.

    It begins as aligned as PyTorch's allocator for GPUs has maps begin: sectors depend on that.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    flat = torch.from_numpy(memory[first : first + size]).view(dtype)
    return flat.as_strided(shape, channels_last_strides(shape))


def record(name: str, *, batch: int, dtype: torch.dtype, arch: int) -> list[list[Call]]:
    """The calls that a model's encoder makes, fused for a GPU; those alike together.

    Args:
        name: of the model, one of `VARIANTS`.
        batch: images at once.
        dtype: to compute at.
        arch: compute capability to fuse for.

    Raises:
        BackendUnavailableError: a block has no Triton kernel.
        ImportError: Triton is not installed.
    """
    model = create_efficientvit_sam_model(name, pretrained=False).eval()
    with simt.emulate(arch):
        encoder = evsam_kernels.fuse(model.image_encoder, backend="triton", dtype=dtype)
    size = VARIANTS[name].image_size
    recorder = _Recorder(encoder)
    with torch.inference_mode(), recorder.recording():
        encoder(zeros((batch, 3, size, size), dtype))
    alike: dict[tuple[Any, ...], list[Call]] = {}
    for call in recorder.calls:
        alike.setdefault(call.key, []).append(call)
    return list(alike.values())


def count(alike: Sequence[Call], *, gpu: simt.Gpu, sample: int, backend: str = AUTO) -> Layer:
    """Run a sample of what one of equal calls launches, bound and estimate it.

    Args:
        alike: the calls.
        gpu: to bound and estimate for.
        sample: blocks of each launch that are run to count.
        backend: that runs them.

    Raises:
        simt.FaultError: a launch is at fault.
        simt.ReplayError: a launch cannot be replayed.
        ValueError: a rate or a latency of the GPU is not published.
    """
    first = alike[0]
    return Layer(
        tuple(call.path for call in alike),
        first.operation,
        first.shapes,
        first.ideal(gpu),
        launches(lambda: first.call(*first.arguments, backend), gpu=gpu, sample=sample),
    )


def launches(run: Callable[[], object], *, gpu: simt.Gpu, sample: int) -> tuple[LaunchRow, ...]:
    """What is launched while `run` is called; see `count` for the rest."""
    with simt.emulate(gpu.arch, sample=sample, auto=True) as emulation, torch.inference_mode():
        run()
    return tuple(_row(launch, gpu) for launch in emulation.launches)


def _row(launch: simt.Launch, gpu: simt.Gpu) -> LaunchRow:
    report = launch.report
    bound, estimate = simt.bound(report, gpu), simt.replay(launch, gpu)
    scale = math.prod(report.grid) / len(report.blocks_run)
    sectors, ideal_sectors, wavefronts, ideal_wavefronts = (
        scale * float(report.counters[name].sum())
        for name in ("sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts")
    )
    return LaunchRow(
        kernel=report.kernel,
        grid=report.grid,
        block=math.prod(report.block),
        shared=report.shared,
        registers=estimate.resources.registers,
        spilled=max(estimate.resources.spill_stores or 0, estimate.resources.spill_loads or 0),
        blocks_at_once=estimate.occupancy.blocks,
        bound_seconds=bound.seconds,
        bound_by=bound.binding.limit if bound.binding else "",
        estimate_seconds=estimate.seconds,
        doubtful=estimate.disagreeing,
        sectors=sectors,
        ideal_sectors=ideal_sectors,
        wavefronts=wavefronts,
        ideal_wavefronts=ideal_wavefronts,
        moved=bound.work.amounts.get("DRAM", 0.0),
    )


def images_per_second(layers: Sequence[Layer], batch: int) -> dict[str, float]:
    """At the ideal, at the bound and at the estimate of all layers one after the other."""
    seconds = {
        what: sum(len(layer.paths) * getattr(layer, f"{what}_seconds") for layer in layers)
        for what in ("ideal", "bound", "estimate")
    }
    return {what: batch / total for what, total in seconds.items()}


def run(
    name: str, batch: int, dtype: str, gpu: simt.Gpu, sample: int, json_file: Path | None
) -> None:
    """Inspect a model, print its table and write the JSON.

    Raises:
        CommandError: a layer cannot be counted, or the file cannot be written.
    """
    try:
        constants(gpu.arch)  # Before anything long begins.
        groups = record(name, batch=batch, dtype=getattr(torch, dtype), arch=gpu.arch)
        layers = []
        with progress("layers", len(groups)) as advance:
            for alike in groups:
                layers.append(count(alike, gpu=gpu, sample=sample))
                advance()
    except (
        *(BackendUnavailableError, simt.FaultError, simt.ReplayError),
        *(ValueError, RuntimeError, ImportError),
    ) as error:
        raise CommandError(f"--model {name}: {error}") from error
    title = f"{name}, batch {batch}, {dtype}, on {gpu.name}"
    print_layers(layers, batch, title)
    if json_file is not None:
        report = {
            "package_version": evsam_kernels.__version__,
            **{"model": name, "batch": batch, "dtype": dtype, "gpu": gpu.key},
            **{"blocks_sampled": sample},
            "images_per_second": images_per_second(layers, batch),
            "layers": [_layer_as_json(layer) for layer in layers],
        }
        text = json.dumps(report, indent=1) + "\n"
        try:
            write_atomically(json_file, lambda file: file.write(text.encode()))
        except OSError as error:
            raise CommandError(str(error)) from error


def _layer_as_json(layer: Layer) -> dict[str, Any]:
    return {
        **dataclasses.asdict(layer),
        "bound_seconds": layer.bound_seconds,
        "estimate_seconds": layer.estimate_seconds,
    }


def print_layers(layers: Sequence[Layer], batch: int, title: str) -> None:
    """Print a row for each launch, and what all make together."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, highlight=False)
    table = Table(title=title)
    for heading in ("layer", "operation", "shape", "kernel"):
        table.add_column(heading, overflow="fold")
    for heading in (
        *("grid", "regs", "spilled", "blocks\nper SM", "ideal\nus", "bound\nus"),
        *("estimate\nus", "ideal /\nbound", "ideal /\nestimate"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound by")
    for layer in layers:
        times = f" (x{len(layer.paths)})" if len(layer.paths) > 1 else ""
        several = len(layer.launches) > 1
        whole = _figures(layer.ideal_seconds, layer.bound_seconds, layer.estimate_seconds)
        head = [layer.paths[0] + times, layer.operation, layer.shapes]
        if several:
            table.add_row(*head, f"{len(layer.launches)} launches", *[""] * 4, *whole, "")
        for launch in layer.launches:
            own = ["", *_figures(0.0, launch.bound_seconds, launch.estimate_seconds)[1:3], "", ""]
            table.add_row(
                *([""] * 3 if several else head),
                launch.kernel,
                " x ".join(str(n) for n in launch.grid if n > 1) or "1",
                str(launch.registers),
                str(launch.spilled),
                str(launch.blocks_at_once),
                *(own if several else whole),
                launch.bound_by,
            )
    console.print(table)
    rates = images_per_second(layers, batch)
    console.print(
        f"images per second: {rates['ideal']:,.0f} ideal, at most {rates['bound']:,.0f} with these "
        f"kernels, {rates['estimate']:,.0f} estimated (uncalibrated; nothing ran on a GPU)"
    )


def _figures(ideal: float, bound: float, estimate: float) -> list[str]:
    return [
        *(f"{1e6 * seconds:.1f}" for seconds in (ideal, bound, estimate)),
        *(f"{ideal / seconds:.2f}" for seconds in (bound, estimate)),
    ]
