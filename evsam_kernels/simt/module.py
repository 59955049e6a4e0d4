"""Modules of PTX, and launching their kernels in the executor."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from evsam_kernels.simt.report import Fault, Index, Instruction, Report

Array = torch.Tensor | np.ndarray

DEFAULT_STEP_LIMIT = 1 << 25
"""Warp instructions that a block may run before it counts as stuck."""


def executor() -> ModuleType:
    """The extension module, imported when first needed."""
    try:
        from evsam_kernels import _simt
    except ImportError as error:
        raise ImportError(
            "the executor was not built: `evsam info` says why; with a C++20 compiler installed, "
            "run EVSAM_BUILD_CPU=1 pip install evsam-kernels"
        ) from error
    return _simt


@dataclass(frozen=True)
class Buffer:
    """Memory given to a kernel, with what is known about it.

    Attributes:
        array: dense tensor on the CPU or array; the kernel works on its memory in place.
        name: what reports call it; by default the parameter's name, or `args[2]` where the compiler
            dropped that.
        initialised: whether it holds values before the launch; a read of what nothing wrote is a
            fault otherwise.
        writable: whether the kernel may write to it.
    """

    array: Array
    name: str = ""
    initialised: bool = True
    writable: bool = True


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: its name, place and size in bytes, and whether it says .ptr."""

    name: str
    offset: int
    size: int
    pointer: bool


@dataclass(frozen=True)
class Kernel:
    """An entry point of a module.

    Attributes:
        name: as the PTX has it, mangled where the source was C++.
        parameters: in order.
        static_shared: bytes of shared memory that the kernel declares.
        local_bytes: of memory a thread for arrays and spilled registers, and for calls.
        required_block: the only block size that the kernel works with, or None for any.
    """

    name: str
    parameters: tuple[Parameter, ...]
    static_shared: int
    local_bytes: int
    required_block: Index | None


class Module:
    """A text of PTX whose kernels run on the CPU.

    Args:
        ptx: the text, for any sm_ target.
        sources: texts of the source files, by the names that the PTX gives them; for annotation.

    Attributes:
        ptx, sources: as given.
        target: the architecture that the PTX was made for, such as "sm_80".
        kernels: the entry points, by name.

    Raises:
        ValueError: the text is not PTX; the message names the line.
        ImportError: the extension module was not built.
    """

    def __init__(self, ptx: str, *, sources: Mapping[str, str] | None = None) -> None:
        self.ptx = ptx
        self.sources = dict(sources or {})
        self._program = executor().Program(ptx)
        self.target: str = self._program.target
        self.kernels = tuple(
            Kernel(
                kernel.name,
                tuple(Parameter(p.name, p.offset, p.size, p.pointer) for p in kernel.parameters),
                kernel.static_shared,
                kernel.local_bytes,
                kernel.required_block,
            )
            for kernel in self._program.kernels
        )
        self._parameter_bytes = {k.name: k.parameter_bytes for k in self._program.kernels}
        self._instructions: dict[str, tuple[Instruction, ...]] = {}

    def kernel(self, name: str) -> Kernel:
        """The kernel called `name`.

        Raises:
            ValueError: there is none.
        """
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        known = ", ".join(kernel.name for kernel in self.kernels) or "none"
        raise ValueError(f"there is no kernel {name!r}; the module has {known}")

    def instructions(self, name: str) -> tuple[Instruction, ...]:
        """The instructions of a kernel and of the functions that it calls.

        Raises:
            ValueError: there is no such kernel, or it has an instruction that the executor lacks.
        """
        if name not in self._instructions:
            self.kernel(name)
            self._instructions[name] = tuple(
                Instruction(i.text, i.ptx_line, i.file, i.line, i.kind)
                for i in self._program.instructions(name)
            )
        return self._instructions[name]

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared: int,
        args: Sequence[Any],
        *,
        check: bool = True,
        threads: int | None = None,
        step_limit: int = DEFAULT_STEP_LIMIT,
        blocks: Sequence[int] | None = None,
    ) -> Report:
        """Run a kernel.

        Args:
            name: of the kernel.
            grid: number of blocks along x, y and z; missing axes are 1.
            block: number of threads of a block, likewise.
            shared: bytes of dynamic shared memory.
            args: one for each parameter: a dense tensor on the CPU, a NumPy array or a `Buffer`
                for a pointer, and a number, a NumPy scalar or bytes for anything else. Python
                floats fill parameters of 4 bytes as float32 and of 8 as float64.
            check: whether accesses are checked against each other and counted. Bounds are checked
                always.
            threads: of the CPU; all by default. The result does not depend on it unless blocks
                race.
            step_limit: warp instructions that a block may run.
            blocks: which blocks of the grid to run, by linear index (x + y * grid x + z * grid x *
                grid y); all where None. The counters are then of those blocks alone. What others
                would have written stays unwritten.

        Returns:
            What happened; the faults in it are not raised.

        Raises:
            ValueError: an argument that a GPU would refuse, or an instruction that the executor
                does not have.
            TypeError: an argument of a type that cannot be passed.
        """
        kernel = self.kernel(name)
        if len(args) != len(kernel.parameters):
            raise ValueError(
                f"args must have {len(kernel.parameters)} values, one for each parameter of "
                f"{name}, got {len(args)}"
            )
        blob = bytearray(self._parameter_bytes[name])
        buffers: list[tuple[Buffer, str, tuple[int, int, bool]]] = []
        for number, (parameter, arg) in enumerate(zip(kernel.parameters, args, strict=True)):
            label = f"args[{number}]"
            if isinstance(arg, (torch.Tensor, np.ndarray)):
                arg = Buffer(arg)
            if isinstance(arg, Buffer):
                shown = arg.name or _name(parameter, name, number)
                buffers.append((arg, shown, _memory(arg.array, label)))
                value = buffers[-1][2][0].to_bytes(8, "little")
            else:
                value = _scalar(arg, parameter.size, label)
            if len(value) != parameter.size:
                raise ValueError(
                    f"{label} takes {len(value)} bytes, the parameter {parameter.name} "
                    f"has {parameter.size}"
                )
            blob[parameter.offset : parameter.offset + parameter.size] = value
        grid, block = _three(grid, "grid"), _three(block, "block")
        chosen = None if blocks is None else sorted(set(blocks))
        if chosen is not None and not (chosen and 0 <= chosen[0] <= chosen[-1] < math.prod(grid)):
            raise ValueError(
                f"blocks must be indices below {math.prod(grid)}, at least one, got {blocks!r}"
            )
        merged = _merged(buffers)
        instructions = self.instructions(name)
        launched = self._program.launch(
            kernel=name,
            grid=grid,
            block=block,
            dynamic_shared=shared,
            parameters=bytes(blob),
            buffers=merged,
            check=check,
            threads=(os.cpu_count() or 1) if threads is None else threads,
            step_limit=step_limit,
            sample=chosen or [],
        )
        return Report(
            kernel=name,
            grid=grid,
            block=block,
            shared=shared,
            blocks_run=range(math.prod(grid)) if chosen is None else tuple(chosen),
            checked=check,
            faults=tuple(_fault(fault, instructions) for fault in launched.faults),
            instructions=instructions,
            counters=launched.counters,
            buffer_bytes={buffer.name: buffer.size for buffer in merged},
            unique_bytes=launched.unique_bytes,
        )


def _fault(fault: Any, instructions: tuple[Instruction, ...]) -> Fault:
    other = fault.other_instruction
    return Fault(
        kind=fault.kind,
        message=fault.message,
        instruction=instructions[fault.instruction],
        block=fault.block,
        thread=fault.thread,
        buffer=fault.buffer,
        offset=fault.offset,
        other_block=fault.other_block,
        other_thread=fault.other_thread,
        other_instruction=None if other is None else instructions[other],
        count=fault.count,
    )


def _three(size: int | Sequence[int], name: str) -> Index:
    axes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(axes) <= 3 or not all(isinstance(n, int) for n in axes):
        raise ValueError(f"{name} must be one to three integers, got {size!r}")
    x, y, z = (*axes, 1, 1)[:3]
    return x, y, z


def _memory(array: Array, label: str) -> tuple[int, int, bool]:
    """Address and bytes of an array's elements, and whether they may be written."""
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise ValueError(f"{label} is on {array.device}; the executor needs it on the CPU")
        if not _is_dense(array.shape, array.stride()):
            raise ValueError(f"{label} is not dense; call .contiguous()")
        return array.data_ptr(), array.numel() * array.element_size(), True
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{label} must hold a tensor or an array, got {type(array).__name__}")
    strides = [stride // max(array.itemsize, 1) for stride in array.strides]
    if not _is_dense(array.shape, strides):
        raise ValueError(f"{label} is not dense; call np.ascontiguousarray")
    return array.ctypes.data, array.nbytes, bool(array.flags.writeable)


def _name(parameter: Parameter, kernel: str, number: int) -> str:
    """What a buffer without a name is called; the names that compilers make up say nothing."""
    made_up = parameter.name == f"{kernel}_param_{number}"
    return f"args[{number}]" if made_up else parameter.name


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie side by side, in any order of the axes."""
    expected = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if extent > 1 and stride != expected:
            return False
        expected *= extent
    return True


def _scalar(value: Any, size: int, label: str) -> bytes:
    """The bytes of a parameter of `size` bytes."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, float):
        if size not in (4, 8):
            raise ValueError(f"{label} is a float, the parameter has {size} bytes; pass bytes")
        return struct.pack("<f" if size == 4 else "<d", value)
    if isinstance(value, int):
        if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
            raise ValueError(f"{label} is {value}, which {size} bytes cannot hold")
        return value.to_bytes(size, "little", signed=value < 0)
    raise TypeError(
        f"{label} must be a tensor, an array, a Buffer, a number or bytes, "
        f"got {type(value).__name__}"
    )


def _merged(buffers: list[tuple[Buffer, str, tuple[int, int, bool]]]) -> list[Any]:
    """What the executor is told of the buffers; arguments that share memory become one."""
    native = executor()
    merged: list[tuple[str, int, int, bool, bool]] = []
    for buffer, name, (address, size, writable) in sorted(buffers, key=lambda b: b[2][0]):
        if size == 0:
            continue
        writable = writable and buffer.writable
        if merged and address < merged[-1][1] + merged[-1][2]:
            first, start, length, was_writable, was_initialised = merged[-1]
            end = max(start + length, address + size)
            merged[-1] = (
                first if name in first.split(" = ") else f"{first} = {name}",
                start,
                end - start,
                was_writable or writable,
                was_initialised or buffer.initialised,
            )
        else:
            merged.append((name, address, size, writable, buffer.initialised))
    names: dict[str, int] = {}
    for name, *_ in merged:
        names[name] = names.get(name, 0) + 1
    if any(count > 1 for count in names.values()):
        twice = next(name for name, count in names.items() if count > 1)
        raise ValueError(f"two buffers are called {twice!r}: give each a name of its own")
    return [native.Buffer(*fields) for fields in merged]
