"""Stands in for a GPU: Triton kernels launched on tensors on the CPU run in the executor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from evsam_kernels.simt.compile import triton_module
from evsam_kernels.simt.module import Buffer, Module
from evsam_kernels.simt.occupancy import max_shared
from evsam_kernels.simt.report import FaultError, Report

_MAX_THREADS = 1024


@dataclass(frozen=True)
class Launch:
    """A kernel that was launched.

    Attributes:
        module: what it is in.
        report: what it did.
    """

    module: Module
    report: Report


@dataclass
class Emulation:
    """What was launched so far.

    Attributes:
        arch: compute capability that kernels are compiled for.
        check: whether accesses are checked and counted.
        threads: of the CPU; None for all.
        sample: blocks that are run of each launch, about; None for all.
        auto: whether backend="auto" takes kernels for GPUs.
        launches: in order.
    """

    arch: int
    check: bool
    threads: int | None
    sample: int | None
    auto: bool
    launches: list[Launch] = field(default_factory=list)

    def launch(
        self, module: Module, name: str, grid: Sequence[int], block: int, shared: int, args: Any
    ) -> None:
        """Run a kernel, where its grid is not empty, and keep the report.

        Args:
            module: what it is in.
            name: what the module calls it.
            grid: number of blocks along x, y and z.
            block: threads of a block.
            shared: bytes of dynamic shared memory.
            args: name and value of each argument, in order.

        Raises:
            FaultError: it did what a GPU does not define or forbids.
        """
        if 0 in grid:
            return
        report = module.launch(
            name,
            grid,
            block,
            shared,
            [
                Buffer(
                    value,
                    name=argument,
                    # What blocks that are left out would have written is not there.
                    initialised=self.sample is not None or value not in _unwritten,
                )
                if torch.is_tensor(value)
                else value
                for argument, value in args
            ],
            check=self.check,
            threads=self.threads,
            blocks=None if self.sample is None else spread(math.prod(grid), self.sample),
        )
        if report.faults:
            raise FaultError(report)
        self.launches.append(Launch(module, report))
        for _, value in args:
            if torch.is_tensor(value):
                _unwritten.pop(value, None)


_current: ContextVar[Emulation | None] = ContextVar("current emulation", default=None)
_unwritten: Any = WeakTensorKeyDictionary()


def current() -> Emulation | None:
    """The emulation that is in force here, if any."""
    return _current.get()


def spread(blocks: int, sample: int) -> list[int]:
    """`sample` indices of blocks, or all where there are no more: the middles of equal runs.

    A grid's first and last block are less like the others: corners of a map, part of a tile.
    """
    if sample >= blocks:
        return list(range(blocks))
    return [(2 * i + 1) * blocks // (2 * sample) for i in range(sample)]


def unwritten(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, memory that was only just allocated.

    Where `emulate` is in force it is filled with NaN, and the first kernel that gets it is at fault
    if it reads what it has not written; of launches that are only sampled, with zeros, as values
    mean nothing then.
    """
    emulation = current()
    if emulation is not None and emulation.sample is not None:
        tensor.zero_()
    elif emulation is not None:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        _unwritten[tensor] = True
    return tensor


@contextmanager
def emulate(
    arch: int = 80,
    *,
    check: bool = True,
    threads: int | None = None,
    sample: int | None = None,
    auto: bool = False,
) -> Iterator[Emulation]:
    """Run Triton kernels in the executor, as if the CPU were a GPU.

    In the block `kernel[grid](...)` takes tensors on the CPU, whoever wrote the kernel, and the
    backends for GPUs do: `ek.ops.conv_act(x, ..., backend="triton")`. Triton compiles what it would
    compile on the GPU. Other threads are not affected: they launch where they would without it,
    unless they enter a block of their own.

    Args:
        arch: compute capability to compile for, 80 for sm_80.
        check: whether accesses are checked against each other and counted. Bounds are checked
            always.
        threads: of the CPU; all by default.
        sample: run only so many blocks of each launch, evenly spread: to count large launches.
            Values mean nothing then, memory that nothing has written is not looked for, and
            outputs start out as zeros.
        auto: have `backend="auto"` take what it takes on a GPU. Otherwise kernels for GPUs run
            where they are asked for by name, as anything is faster than the executor.

    Yields:
        what is launched, as it is.

    Raises:
        FaultError: from a launch in the block, which is at fault.
        ImportError: from here, where Triton is not installed; from a launch, where the executor was
            not built.
        ValueError: nothing is known of that architecture, or `sample` is less than 1.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    emulation = Emulation(arch, check, threads, sample, auto)
    _install()
    token = _current.set(emulation)
    try:
        yield emulation
    finally:
        _current.reset(token)


def _install() -> None:
    """Have Triton ask `_Switch` which GPU there is."""
    try:
        from triton.runtime import driver
    except ImportError as error:
        raise ImportError("emulate needs Triton: pip install triton") from error
    try:
        active = driver.active
    except RuntimeError:  # There is no GPU.
        driver.set_active(_Switch(None))
        return
    if not isinstance(active, _Switch):
        driver.set_active(_Switch(active))


class _Switch:
    """Triton's driver: the executor where `emulate` is in force, elsewhere the one there was."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        emulation = current()
        if emulation is not None:
            return getattr(_Driver(emulation.arch), name)
        if self._real is None:
            raise RuntimeError(
                "Triton finds no GPU here; kernels can be launched in `with simt.emulate():`"
            )
        return getattr(self._real, name)


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self.launcher_cls = _Launcher
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> str:
        # Triton keeps what it has compiled by device, which real ones have numbers for.
        return f"sm_{self._arch} in the executor"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": max_shared(self._arch)}

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        """Module, function, registers, spills and most threads: the executor runs PTX instead."""
        return object(), 0, 0, 0, _MAX_THREADS

    def get_benchmarker(self) -> Any:
        raise RuntimeError(
            "the executor has no times to choose by: leave an autotuned kernel one configuration"
        )


class _Launcher:
    """Launches one compiled Triton kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.runtime.cache import get_cache_manager

        # Drivers are given the machine code alone; the PTX that it was made of is kept beside it.
        files = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json")
        ptx = next(Path(path) for name, path in files.items() if name.endswith(".ptx"))
        self._module = triton_module(ptx.read_text(encoding="utf-8"), metadata)
        self._argument_names = source.fn.arg_names
        self._is_parameter = [kind != "constexpr" for kind in source.signature.values()]

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        emulation = current()
        assert emulation is not None  # As `_Switch` gives out no launcher otherwise.
        arguments = rest[-len(self._argument_names) :]
        given = zip(self._argument_names, arguments, self._is_parameter, strict=True)
        emulation.launch(
            self._module,
            self._module.name,
            (x, y, z),
            self._module.block[0],
            self._module.shared,
            [(name, value) for name, value, parameter in given if parameter],
        )
