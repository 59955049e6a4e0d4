"""`evsam info`: what was built, found and skipped, and why."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

import evsam_kernels
from evsam_kernels.backends import AUTO, BACKENDS, build_info
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import machine
from evsam_kernels.ops import tiling
from evsam_kernels.ops.registry import OPERATIONS, chosen_backend, has_kernel
from evsam_kernels.simt import toolchain

_GPU_TOOLS = {
    "nvcc": "compiles CUDA kernels",
    "ptxas": "makes machine code of them",
    "cuobjdump": "says what it takes",
    "nvdisasm": "prints it",
}
_OPTIONAL_PACKAGES = {
    "triton": "writes GPU kernels",
    "pycocotools": "masks as COCO run lengths",
    "scipy": "removal of small regions from masks, estimates of `evsam inspect --model`",
    "matplotlib": "plots",
    "safetensors": "checkpoints in .safetensors",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="what was built, found and skipped, and why",
        description="Say what was built, found and skipped, and why.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print what is known of the installation and the machine."""
    try:
        facts = gather()
    except ValueError as error:  # An environment variable has a value that means nothing.
        raise CommandError(str(error)) from error
    print(json.dumps(facts, indent=2) if arguments.json else _as_text(facts))
    return 0


def gather() -> dict[str, Any]:
    """What `evsam info --json` prints, with these keys.

    - "package": name, version and folder;
    - "build": the fields of `BuildInfo`;
    - "cpu_kernels": the instruction set that the C++ kernels use, and those that they could use
      here; None without them;
    - "machine": the fields of `Machine`;
    - "cuda": whether there is a GPU, why not, which;
    - "backends": per backend what executes it, on which devices, whether it can run here, why not;
    - "operations": per operation the backends that have a kernel, and by type of device the one
      that "auto" picks at float32;
    - "tiles": whether EVSAM_AUTOTUNE asks for tiles of Triton kernels to be timed, and the file of
      each GPU that keeps the best;
    - "gpu_tools": per program of the CUDA toolkit its path or None, why there is none, and what it
      is for;
    - "optional_packages": per package its version or None, and what it is for.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "package": {
            "name": "evsam-kernels",
            "version": evsam_kernels.__version__,
            "folder": str(Path(evsam_kernels.__file__).parent),
        },
        "build": dataclasses.asdict(build_info.read()),
        "cpu_kernels": _cpu_kernels(),
        "machine": dataclasses.asdict(machine()),
        "cuda": _cuda(),
        "backends": [
            {
                "name": backend.name,
                "executes": backend.executes,
                "devices": backend.device_types,
                "available": backend.why_unavailable() is None,
                "reason": backend.why_unavailable(),
            }
            for backend in BACKENDS.values()
        ],
        "operations": [
            {
                "name": op,
                "kernels": [name for name in BACKENDS if has_kernel(op, name)],
                "auto": {
                    device: chosen_backend(op, AUTO, device, torch.float32) for device in devices
                },
            }
            for op in OPERATIONS
        ],
        "tiles": {
            "autotune": tiling.enabled(),
            "files": [
                str(tiling.cache_file(torch.cuda.get_device_name(index)))
                for index in range(torch.cuda.device_count())
            ],
        },
        "gpu_tools": [_gpu_tool(tool, purpose) for tool, purpose in _GPU_TOOLS.items()],
        "optional_packages": [
            {"name": name, "version": _version(name), "purpose": purpose}
            for name, purpose in _OPTIONAL_PACKAGES.items()
        ],
    }


def _cpu_kernels() -> dict[str, Any] | None:
    if BACKENDS["cpu"].why_unavailable() is not None:
        return None
    kernels = importlib.import_module("evsam_kernels._cpu")
    return {"isa": kernels.isa(), "available_isas": kernels.available_isas()}


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None and torch.version.hip is None:
        reason: str | None = "this PyTorch was built for the CPU alone"
    elif not torch.cuda.is_available():
        reason = "PyTorch finds no GPU"
    else:
        reason = None
    devices = range(torch.cuda.device_count()) if reason is None else ()
    return {
        "available": reason is None,
        "reason": reason,
        "devices": [torch.cuda.get_device_name(index) for index in devices],
    }


def _gpu_tool(tool: str, purpose: str) -> dict[str, Any]:
    path = reason = None
    try:
        path = str(toolchain.find(tool)[0])
    except toolchain.ToolNotFoundError as error:
        reason = str(error)
    return {"name": tool, "path": path, "reason": reason, "purpose": purpose}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_text(facts: dict[str, Any]) -> str:
    package, on, cuda = facts["package"], facts["machine"], facts["cuda"]
    commit = f", commit {on['commit']}" if on["commit"] else ""
    sections = {
        f"{package['name']} {package['version']}{commit}": {
            "folder": package["folder"],
            "Python": f"{on['python']} on {on['system']}",
            "PyTorch": on["torch"],
            "processor": on["processor"],
            "instruction sets": " ".join(on["instruction_sets"]) or "unknown",
            "cores, threads": f"{on['cores']} usable, PyTorch uses {on['threads']} threads",
            "GPU": ", ".join(cuda["devices"]) or f"none: {cuda['reason']}",
            "tiles": _tiles(facts["tiles"]),
        },
        "build": _build_rows(facts["build"], facts["cpu_kernels"]),
        "backends": {
            backend["name"]: f"{backend['executes']}: {backend['reason'] or 'available'}"
            for backend in facts["backends"]
        },
        "operations": {
            op["name"]: f"kernels: {', '.join(op['kernels'])}; auto picks "
            + ", ".join(f"{name} on {device}" for device, name in op["auto"].items())
            for op in facts["operations"]
        },
        "programs for GPU kernels": {
            tool["name"]: f"{tool['path'] or tool['reason']} ({tool['purpose']})"
            for tool in facts["gpu_tools"]
        },
        "optional packages": {
            optional["name"]: f"{optional['version'] or _how_to_get(optional['name'])}"
            f" ({optional['purpose']})"
            for optional in facts["optional_packages"]
        },
    }
    lines = []
    for title, rows in sections.items():
        width = max(map(len, rows))
        lines += [title, *(f"  {name:{width}}  {value}" for name, value in rows.items()), ""]
    return "\n".join(lines[:-1])


def _tiles(tiles: dict[str, Any]) -> str:
    if not tiles["autotune"]:
        return f"from a table; {tiling.VARIABLE}=1 has GPUs time them on first use"
    files = ", ".join(tiles["files"]) or "no GPU yet"
    return f"timed on first use ({tiling.VARIABLE}=1), kept in {files}"


def _build_rows(build: dict[str, Any], kernels: dict[str, Any] | None) -> dict[str, str]:
    info = build_info.BuildInfo(**build)
    if info.cpu_built:
        rows = {
            "C++ kernels": f"built for {', '.join(info.isa_flags)}",
            "GPU executor": "built",
            "compiler": info.compiler,
            "flags": info.flags,
        }
    else:
        rows = {"C++ kernels": info.cpu}
    if info.cpu_built and kernels is not None:
        runnable = ", ".join(kernels["available_isas"])
        rows["instruction set"] = f"{kernels['isa']} in use; this processor runs {runnable}"
    return {**rows, "CUDA kernels": info.cuda}


def _how_to_get(package: str) -> str:
    return f"not installed: pip install {package}"
