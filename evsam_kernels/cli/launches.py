"""Reads KERNEL of `evsam inspect`: where a kernel is and how it is launched, in one argument."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evsam_kernels import simt

HELP = """\
KERNEL is one of
  FILE                              a .cu or .ptx file: all its kernels, which are not launched
  FILE:NAME                         one of them
  FILE:NAME<<<GRID, BLOCK>>>(...)   launched as in CUDA; a third number is dynamic shared memory
  FILE.py:NAME[GRID](...)           a Triton kernel, launched as in Python; or MODULE:NAME...
for example
  saxpy.cu:saxpy<<<4, 256>>>(f32[1000], f32[1000], 2.5, 1000)
  norms.py:softmax[8](f32[8, 100], empty(f32[8, 100]), 100, COLUMNS=128, num_warps=2)
Arguments are Python expressions: f32[8, 100] is a tensor of random numbers (f16, bf16, f64, i32
and so on likewise), empty(f32[8]) memory that nothing has written yet, zeros(f32[8]) zeros;
x=f32[8] gives a CUDA kernel's buffer a name for the report."""

_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
_TRITON_TYPES = {
    "f16": "fp16",
    "f32": "fp32",
    "f64": "fp64",
}
_FORM = re.compile(
    r"(?P<place>[^<\[(]+?)"
    r"(?:(?:<<<(?P<cuda>.+?)>>>|\[(?P<triton>[^\]]+)\])(?P<arguments>\(.*\)))?",
    re.DOTALL,
)
_LAUNCH_OPTIONS = ("num_warps", "num_stages")


class KernelArgumentError(ValueError):
    """A KERNEL argument cannot be understood or found; the message says what is expected."""


@dataclass(frozen=True)
class Launch:
    """What is between <<< >>> or [ ], and between ( )."""

    configuration: tuple[Any, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class KernelArgument:
    """A KERNEL argument, taken apart.

    Attributes:
        text: as it was given.
        place: a file, or a Python module.
        function: the kernel; "" for all of the file.
        launch: how to launch it; None not to.
    """

    text: str
    place: str
    function: str
    launch: Launch | None


@dataclass(frozen=True)
class Prepared:
    """A compiled module and, where a kernel is to be launched, `Module.launch`'s arguments."""

    module: simt.Module
    function: str
    launch: tuple[Any, Any, int, list[Any]] | None = None


class _Random:
    """A dtype, which makes tensors of random numbers: `f32[8, 100]`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, shape: int | tuple[int, ...]) -> torch.Tensor:
        sizes = (shape,) if isinstance(shape, int) else shape
        if self.dtype.is_floating_point:
            return torch.randn(sizes, generator=self.generator).to(self.dtype)
        high = min(torch.iinfo(self.dtype).max, 2**31 - 1)
        return torch.randint(0, high, sizes, generator=self.generator).to(self.dtype)


def _empty(tensor: torch.Tensor) -> simt.Buffer:
    return simt.Buffer(tensor, initialised=False)


def parse(text: str) -> KernelArgument:
    """Take a KERNEL argument apart.

    The arguments of a launch are Python expressions. In them `f32[8, 100]` and the like are tensors
    of normally distributed numbers (of random ones from 0 on for integers), `empty(f32[8])` is
    memory that nothing has written yet, `zeros(f32[8])` holds zeros, and `torch` is PyTorch.

    Raises:
        KernelArgumentError: it has another form, or an expression fails.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise KernelArgumentError(
            "KERNEL must be FILE.cu:NAME<<<GRID, BLOCK>>>(ARGUMENTS), "
            f"FILE.py:NAME[GRID](ARGUMENTS) or FILE, got {text!r}"
        )
    place, _, function = match["place"].strip().rpartition(":")
    if not place:
        place, function = function, ""
    configuration = match["cuda"] or match["triton"]
    if configuration is None:
        return KernelArgument(text, place, function, None)
    if place.endswith((".cu", ".ptx")) != (match["cuda"] is not None):
        form = "NAME<<<GRID, BLOCK>>>(...)" if match["triton"] else "NAME[GRID](...)"
        raise KernelArgumentError(f"{text}: a kernel of {place} is launched as {form}")
    if not function:
        raise KernelArgumentError(f"{text}: name the kernel to launch, {place}:NAME...")
    grid, _ = _evaluate(f"({configuration},)", text)
    args, keywords = _evaluate(match["arguments"], text)
    return KernelArgument(text, place, function, Launch(grid, args, keywords))


def _evaluate(arguments: str, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call that is written `(1, f32[3], n=4)`."""
    names = {
        "_collect": lambda *args, **keywords: (args, keywords),
        "__builtins__": {},
        "torch": torch,
        "zeros": torch.zeros_like,
        "empty": _empty,
        **{name: _Random(dtype) for name, dtype in _DTYPES.items()},
    }
    try:
        # The user's own expressions, at the user's own command line.
        result: tuple[tuple[Any, ...], dict[str, Any]] = eval(f"_collect{arguments}", names)
    except Exception as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise KernelArgumentError(
            f"{text}: {arguments} cannot be evaluated: {reason}; arguments are numbers and tensors "
            f"such as {', '.join(f'{name}[8, 100]' for name in ('f32', 'i32'))} or empty(f32[8])"
        ) from error
    return result


def prepare(kernel: KernelArgument, arch: int) -> Prepared:
    """Find and compile a kernel.

    Raises:
        KernelArgumentError: there is no such kernel, or the launch does not fit it.
        simt.ToolNotFoundError, simt.ToolError, ImportError: it cannot be compiled here.
    """
    path = Path(kernel.place)
    if path.suffix in (".cu", ".ptx"):
        if not path.is_file():
            raise KernelArgumentError(f"{kernel.text}: there is no file {path}")
        if path.suffix == ".cu":
            module = simt.compile_cuda(path, arch)
        else:
            text = path.read_text(encoding="utf-8")
            module = simt.Module(text, sources={path.name: text})
        return _prepare_cuda(kernel, module)
    return _prepare_triton(kernel, arch)


def _prepare_cuda(kernel: KernelArgument, module: simt.Module) -> Prepared:
    if not kernel.function:
        return Prepared(module, "")
    names = [
        found.name
        for found in module.kernels
        # As in the source, where C++ has mangled it.
        if found.name == kernel.function
        or found.name.startswith(f"_Z{len(kernel.function)}{kernel.function}")
    ]
    if len(names) != 1:
        there = ", ".join(found.name for found in module.kernels)
        problem = "is not one kernel but several" if names else "is not there"
        raise KernelArgumentError(f"{kernel.text}: {kernel.function} {problem}; there is {there}")
    if kernel.launch is None:
        return Prepared(module, names[0])
    if len(kernel.launch.configuration) not in (2, 3):
        raise KernelArgumentError(
            f"{kernel.text}: between <<< and >>> must be grid, block and perhaps bytes of dynamic "
            f"shared memory, got {len(kernel.launch.configuration)} values"
        )
    grid, block, *shared = kernel.launch.configuration
    args = [
        *kernel.launch.args,
        *(_named(value, name) for name, value in kernel.launch.keywords.items()),
    ]
    return Prepared(module, names[0], (grid, block, *(shared or [0]), args))


def _prepare_triton(kernel: KernelArgument, arch: int) -> Prepared:
    if kernel.launch is None or not kernel.function:
        raise KernelArgumentError(
            f"{kernel.text}: what a Triton kernel compiles to depends on its arguments; give them "
            f"as in FILE.py:NAME[GRID](f32[8, 100], 100, COLUMNS=128, num_warps=2)"
        )
    function = getattr(_import(kernel), kernel.function, None)
    if function is None:
        raise KernelArgumentError(f"{kernel.text}: {kernel.place} has no {kernel.function}")
    names: Sequence[str] = function.arg_names
    options = {
        name: value for name, value in kernel.launch.keywords.items() if name in _LAUNCH_OPTIONS
    }
    values = dict(zip(names, kernel.launch.args, strict=False)) | {
        name: value for name, value in kernel.launch.keywords.items() if name not in options
    }
    if len(kernel.launch.args) > len(names):
        raise KernelArgumentError(
            f"{kernel.text}: {kernel.function} takes {', '.join(names)}, got "
            f"{len(kernel.launch.args)} positional arguments"
        )
    constexprs = {parameter.name for parameter in function.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    for name, value in values.items():
        kind = None if name in constexprs else _triton_type(value)
        if kind is not None:
            signature[name] = kind
    constants = {name: value for name, value in values.items() if name not in signature}
    try:
        module = simt.compile_triton(function, signature, constants, arch, **options)
    except ValueError as error:
        raise KernelArgumentError(f"{kernel.text}: {error}") from error
    args = [_named(values[name], name) for name in names if name in signature]
    grid = kernel.launch.configuration
    return Prepared(
        module,
        module.name,
        (grid[0] if len(grid) == 1 else grid, module.block, module.shared, args),
    )


def _triton_type(value: Any) -> str | None:
    """What Triton takes an argument for; None where it makes it a constant."""
    if isinstance(value, simt.Buffer):
        value = value.array
    if isinstance(value, torch.Tensor):
        short = next(name for name, dtype in _DTYPES.items() if dtype == value.dtype)
        return f"*{_TRITON_TYPES.get(short, short)}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and value != 1:
        return ("i32" if abs(value) < 2**31 else "i64") + (":16" if value % 16 == 0 else "")
    return None


def _named(value: Any, name: str) -> Any:
    if isinstance(value, simt.Buffer):
        return simt.Buffer(value.array, name=name, initialised=value.initialised)
    return simt.Buffer(value, name=name) if isinstance(value, torch.Tensor) else value


def _import(kernel: KernelArgument) -> Any:
    path = Path(kernel.place)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None  # As the suffix is that of Python.
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(path.parent))  # As `python FILE` has it, for what it imports.
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.remove(str(path.parent))
            return module
        return importlib.import_module(kernel.place)
    except (ImportError, OSError) as error:
        raise KernelArgumentError(f"{kernel.text}: {error}") from error
