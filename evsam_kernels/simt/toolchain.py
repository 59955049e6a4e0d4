"""Finds and runs NVIDIA's compiler tools, wherever they were installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_REMEDY = {
    "nvcc": "install the CUDA toolkit, point CUDA_HOME at it, or pip install 'evsam-kernels[cuda]'",
    "ptxas": "pip install 'evsam-kernels[cuda]', or install the CUDA toolkit or Triton",
    "cuobjdump": "pip install 'evsam-kernels[cuda]', or install the CUDA toolkit or Triton",
    "nvdisasm": "pip install 'evsam-kernels[cuda]', or install the CUDA toolkit or Triton",
}


class ToolNotFoundError(RuntimeError):
    """A program of the CUDA toolkit is not installed; the message says how to get it."""


class ToolError(RuntimeError):
    """A program of the CUDA toolkit refused its input; the message is what it said."""


def find(tool: str, *, prefer: str | None = None) -> list[Path]:
    """Where `tool` is installed, the first choice first.

    The order is CUDA_HOME (or CUDA_PATH), PATH, NVIDIA's packages of PyPI, Triton's own copy.

    Args:
        tool: "nvcc", "ptxas", "cuobjdump" or "nvdisasm".
        prefer: a package whose own copy comes first, "triton".

    Raises:
        ToolNotFoundError: it is installed nowhere.
    """
    found = list(dict.fromkeys(path.resolve() for path in _candidates(tool) if _runs(path)))
    if prefer is not None:
        found.sort(key=lambda path: prefer not in path.parts)
    if not found:
        raise ToolNotFoundError(f"{tool} is not installed: {_REMEDY[tool]}")
    return found


def _candidates(tool: str) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "bin", tool)
    on_path = shutil.which(tool)
    if on_path:
        yield Path(on_path)
    for folder in _package_folders("nvidia"):
        yield from sorted(folder.glob(f"cu*/bin/{tool}"), reverse=True)
    for folder in _package_folders("triton"):
        yield folder / "backends" / "nvidia" / "bin" / tool


def _package_folders(package: str) -> list[Path]:
    """The folders of a package, which is not imported for that."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def run(tool: str, arguments: Sequence[str | Path], *, prefer: str | None = None) -> str:
    """What `tool` prints, on both streams.

    Where there are several copies, they are tried in turn: an older one refuses what a newer
    compiler wrote. `prefer` is that of `find`.

    Raises:
        ToolNotFoundError: it is installed nowhere.
        ToolError: all copies fail; the message is what the first one said.
    """
    complaints = []
    for path in find(tool, prefer=prefer):
        done = subprocess.run(
            [path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode == 0:
            return done.stdout
        complaints.append(f"{path} fails with status {done.returncode}:\n{done.stdout.strip()}")
    raise ToolError(complaints[0])
