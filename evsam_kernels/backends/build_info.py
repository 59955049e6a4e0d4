"""What the installation built, read from the record that setup.py leaves beside the package."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

_RECORD = Path(__file__).parents[1] / "build_info.json"


@dataclass(frozen=True)
class BuildInfo:
    """The record of one build.

    Attributes:
        cpu_built: whether the C++ kernels were built.
        cpu_reason: why not; empty where they were built.
        compiler: name and version of the C++ compiler; empty where none was used.
    """

    cpu_built: bool
    cpu_reason: str
    compiler: str


@functools.cache
def read() -> BuildInfo:
    """The record of the build this package comes from."""
    if not _RECORD.is_file():
        return BuildInfo(False, "the package runs from a checkout that was never installed", "")
    return BuildInfo(**json.loads(_RECORD.read_text()))
