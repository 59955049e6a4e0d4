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
        isa_flags: for each instruction set that the kernels were compiled for, slowest first, the
            flags that go with it.
    """

    cpu_built: bool
    cpu_reason: str = ""
    version: str = ""
    compiler: str = ""
    flags: str = ""
    isa_flags: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.cpu_built:
            return f"C++ kernels: not built: {self.cpu_reason}"
        return f"C++ kernels: built with {self.compiler} for {', '.join(self.isa_flags)}"


@functools.cache
def read() -> BuildInfo:
    """The record of the build this package comes from."""
    if not _RECORD.is_file():
        return BuildInfo(False, "the package runs from a checkout that was never installed")
    return BuildInfo(**json.loads(_RECORD.read_text(encoding="utf-8")))
