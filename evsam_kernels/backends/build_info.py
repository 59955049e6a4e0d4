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
        version: of the package that was built; empty where nothing was installed.
        compiler: name and version of the C++ compiler; empty where none was used.
        flags: the compiler flags of every C++ file.
        isa_flags: for each instruction set that the kernels were compiled for, plainest first, the
            flags that go with it.
        cuda_built: whether there are images of the CUDA kernels.
        cuda_reason: why not; empty where there are.
        cuda_compiler: version of nvcc; empty where none was used.
        cuda_architectures: what there are cubins for beside the PTX, 80 for sm_80.
    """

    cpu_built: bool
    cpu_reason: str = ""
    version: str = ""
    compiler: str = ""
    flags: str = ""
    isa_flags: dict[str, str] = field(default_factory=dict)
    cuda_built: bool = False
    cuda_reason: str = ""
    cuda_compiler: str = ""
    cuda_architectures: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return f"C++ kernels: {self.cpu}\nCUDA kernels: {self.cuda}"

    @property
    def cpu(self) -> str:
        """What became of the C++ kernels."""
        if not self.cpu_built:
            return f"not built: {self.cpu_reason}"
        return f"built with {self.compiler} for {', '.join(self.isa_flags)}"

    @property
    def cuda(self) -> str:
        """What became of the CUDA kernels."""
        if not self.cuda_built:
            return f"not built: {self.cuda_reason}"
        cubins = "".join(f", cubin for sm_{arch}" for arch in self.cuda_architectures)
        return f"built with {self.cuda_compiler}: PTX{cubins}"


@functools.cache
def read() -> BuildInfo:
    """The record of the build this package comes from."""
    if not _RECORD.is_file():
        reason = "the package runs from a checkout that was never installed"
        return BuildInfo(False, reason, cuda_reason=reason)
    return BuildInfo(**json.loads(_RECORD.read_text(encoding="utf-8")))
