"""Compiles CUDA and Triton kernels to PTX, and PTX to machine code, where there is no GPU."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evsam_kernels.simt import toolchain
from evsam_kernels.simt.module import Module
from evsam_kernels.simt.report import Report

_FILE = re.compile(r'^(\s*\.file\s+\d+\s+)"([^"]*)"', re.MULTILINE)


def compile_cuda(source: str | Path, arch: int = 80, *, options: Sequence[str] = ()) -> Module:
    """Compile CUDA C++ with nvcc.

    Args:
        source: the source text, or the path of a file.
        arch: compute capability to compile for, 80 for sm_80.
        options: further options of nvcc, such as `("--use_fast_math", "-DTILE=64")`.

    Returns:
        the module, whose reports name the lines of `source`; a text is called "kernel.cu".

    Raises:
        ToolNotFoundError: nvcc is not installed; the message says how to get it.
        ToolError: nvcc refuses the source; the message is what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, Path):
            path = source
        else:
            path = Path(folder, "kernel.cu")
            path.write_text(source, encoding="utf-8")
        output = Path(folder, "kernel.ptx")
        toolchain.run(
            "nvcc", ["-ptx", "-lineinfo", f"-arch=sm_{arch}", *options, path, "-o", output]
        )
        ptx, sources = _with_short_names(output.read_text(encoding="utf-8"))
    return Module(ptx, sources=sources)


class TritonModule(Module):
    """A Triton kernel compiled to PTX.

    Attributes:
        name: the kernel's name.
        block: threads of a block, as its number of warps demands.
        shared: bytes of dynamic shared memory that it needs.
    """

    def __init__(
        self, ptx: str, *, sources: Mapping[str, str], name: str, warps: int, shared: int
    ) -> None:
        super().__init__(ptx, sources=sources)
        self.name = name
        self.block = (32 * warps, 1, 1)
        self.shared = shared

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared: int,
        args: Sequence[Any],
        **options: Any,
    ) -> Report:
        """`Module.launch` with the arguments of the signature, in its order, without constants."""
        # Triton adds pointers to scratch memory of its own, which these kernels do not use.
        hidden = [0] * (len(self.kernel(name).parameters) - len(args))
        return super().launch(name, grid, block, shared, [*args, *hidden], **options)


def compile_triton(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 2,
) -> TritonModule:
    """Compile a Triton kernel; neither a GPU nor a driver is needed.

    Args:
        kernel: a function decorated with `triton.jit`; the one inside, where it is autotuned.
        signature: the type of each argument that is no constant, by name: "*fp16" for a pointer,
            "i32", "fp32" and so on. Pointers are taken to be aligned to 16 bytes, as Triton finds
            those of PyTorch's tensors to be; "i32:16" promises a multiple of 16.
        constants: the value of each `tl.constexpr`, and of any other argument to be fixed.
        arch: compute capability to compile for, 80 for sm_80.
        num_warps: warps of a block.
        num_stages: stages of software pipelines.

    Raises:
        ImportError: Triton is not installed.
        TypeError: `kernel` is no Triton kernel.
        ValueError: `signature` and `constants` are not the kernel's arguments, each once.
        RuntimeError: the kernel needs scratch memory that only Triton's launcher provides.
        Exception: Triton's own, where it refuses the kernel.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise ImportError("compile_triton needs Triton: pip install triton") from error

    function = _jit_function(kernel)
    _check_arguments(function.__name__, function.arg_names, signature, constants)

    types: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        types[name], _, hint = signature[name].partition(":")
        if hint not in ("", "16"):
            raise ValueError(
                f"the hint of {name} must be 16, as in 'i32:16', got {signature[name]!r}"
            )
        if hint or types[name].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(function, types, constexprs=dict(constants), attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return triton_module(compiled.asm["ptx"], compiled.metadata)


def triton_module(ptx: str, metadata: Any) -> TritonModule:
    """The module of a kernel that Triton has compiled.

    Raises:
        RuntimeError: the kernel needs scratch memory that only Triton's launcher provides.
    """
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, kind, 0):
            raise RuntimeError(f"{metadata.name} needs {kind}, which a launch here cannot give it")
    ptx, sources = _with_short_names(ptx)
    return TritonModule(
        ptx,
        sources=sources,
        name=metadata.name,
        warps=metadata.num_warps,
        shared=metadata.shared,
    )


def _jit_function(kernel: Any) -> Any:
    """The `JITFunction` in a kernel that may be autotuned or meant for Triton's interpreter."""
    from triton.runtime.jit import JITFunction, KernelInterface

    if isinstance(kernel, JITFunction):
        return kernel
    if not isinstance(kernel, KernelInterface):
        raise TypeError(
            f"kernel must be a function decorated with triton.jit, got {type(kernel).__name__}"
        )
    inner = kernel.fn
    return _jit_function(inner) if isinstance(inner, KernelInterface) else JITFunction(inner)


def _check_arguments(
    kernel: str, names: Sequence[str], signature: Mapping[str, str], constants: Mapping[str, Any]
) -> None:
    for what, wrong in (
        ("neither in signature nor in constants", set(names) - {*signature, *constants}),
        ("both in signature and in constants", set(signature) & set(constants)),
        ("not among its arguments", {*signature, *constants} - set(names)),
    ):
        if wrong:
            raise ValueError(f"{kernel}({', '.join(names)}): {', '.join(sorted(wrong))} {what}")


def _with_short_names(ptx: str) -> tuple[str, dict[str, str]]:
    """The PTX with its `.file` entries cut to their last part, and the texts of those files."""
    sources = {}
    for _, path in _FILE.findall(ptx):
        if Path(path).is_file():
            sources[Path(path).name] = Path(path).read_text(encoding="utf-8")
    return _FILE.sub(lambda match: f'{match[1]}"{Path(match[2]).name}"', ptx), sources
