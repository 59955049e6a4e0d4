"""What the installation built, read from the record that setup.py leaves beside the package."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

_RECORD = Path(__file__).parents[1] / "build_info.json"


@dataclass(frozen=True)
class BuildInfo:
    """The record of one build.

    Attributes:
        cpu_built: whether the C++ kernels were built.
        cpu_reason: why not; empty where they were built.
        cuda_reason: why the CUDA kernels were not compiled; empty where they were.
        version: of the package that was built; empty where nothing was installed.
        compiler: name and version of the C++ compiler; empty where none was used.
        flags: the compiler flags of every C++ file.
        isa_flags: for each instruction set that the kernels were compiled for, slowest first, the
            flags that go with it.
    """

    cpu_built: bool
    cpu_reason: str = ""
    cuda_reason: str = ""
    version: str = ""
    compiler: str = ""
    flags: str = ""
    isa_flags: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        cpu = f"built with {self.compiler} for {', '.join(self.isa_flags)}"
        if not self.cpu_built:
            cpu = f"not built: {self.cpu_reason}"
        cuda = f"not compiled: {self.cuda_reason}" if self.cuda_reason else "compiled"
        return f"C++ kernels: {cpu}; CUDA kernels: {cuda}"


@functools.cache
def read() -> BuildInfo:
    """The record of the build this package comes from."""
    if not _RECORD.is_file():
        reason = "the package runs from a checkout that was never installed"
        return BuildInfo(False, cpu_reason=reason, cuda_reason=reason)
    return BuildInfo(**json.loads(_RECORD.read_text(encoding="utf-8")))
