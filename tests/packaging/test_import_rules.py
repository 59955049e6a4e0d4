"""Who may import whom: the rooms of the package are layers, and this file holds them apart."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "evsam_kernels"

# Lowest first. A room imports itself and lower ones, and not its neighbour on the same floor.
FLOORS = (
    ("simt",),
    ("backends",),
    ("cuda",),
    ("ops",),
    ("nn",),
    ("numerics",),
    ("sam",),
    ("fusion",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

BACKEND_FILE = re.compile(rf"{PACKAGE}\.ops\.\w+\.(cpu|triton|cuda)")
REFERENCE_FILE = re.compile(rf"{PACKAGE}\.ops\.\w+\.reference")
NATIVE = f"{PACKAGE}._cpu"
EXECUTOR = f"{PACKAGE}._simt"


def imported_modules(source: str, modules: frozenset[str]) -> Iterator[str]:
    """Every module that `source` imports, anywhere in it, by full name.

    `from a import b` gives `a.b` where that is one of `modules`, and `a` otherwise.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value)


def room_of(module: str) -> str | None:
    """The room that a module of the package lies in; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def violations(module: str, source: str, modules: frozenset[str]) -> list[str]:
    """What is wrong with the imports of `module`, whose text is `source`."""
    return [
        f"{module} imports {imported}: {problem}"
        for imported in imported_modules(source, modules)
        if (problem := _problem(module, imported))
    ]


def _problem(module: str, imported: str) -> str | None:
    top = imported.split(".")[0]
    if REFERENCE_FILE.fullmatch(module):
        if top in ("torch", *sys.stdlib_module_names) or REFERENCE_FILE.fullmatch(imported):
            return None
        return "a reference imports torch and other references alone"
    if top == "triton":
        allowed = room_of(module) in ("backends", "simt") or module.endswith(".triton")
        return None if allowed else "only backends, simt and the Triton kernels import triton"
    if top != PACKAGE:
        return None
    if (importer := BACKEND_FILE.fullmatch(module)) and (
        (other := BACKEND_FILE.fullmatch(imported))
        and importer[1] != other[1]
        # Triton has the products that go with CUDA's stencils.
        and (importer[1], other[1]) != ("cuda", "triton")
    ):
        return "backend files import those of their own backend alone, and CUDA's Triton's"
    if imported == f"{PACKAGE}.ops.native":
        allowed = module.endswith(".cpu") or module == f"{PACKAGE}.ops.recording"
        return None if allowed else "ops.native serves the C++ launchers"
    if imported == NATIVE:
        allowed = room_of(module) in ("backends", "cli") or module == f"{PACKAGE}.ops.native"
        return None if allowed else "only backends, ops.native and cli import the extension"
    if imported == EXECUTOR:
        allowed = module == f"{PACKAGE}.simt.module"
        return None if allowed else "only simt.module imports the executor"
    here, there = room_of(module), room_of(imported)
    if here in (None, "__main__"):
        return None
    if there is None:
        return None if here == "cli" else "the package imports its rooms, not the reverse"
    if here not in FLOOR_OF or there not in FLOOR_OF:
        return f"{here if here not in FLOOR_OF else there} has no floor: give it one in this test"
    if here != there and FLOOR_OF[there] >= FLOOR_OF[here]:
        return f"{there} is not below {here}"
    return None


def package_files() -> dict[str, Path]:
    """Path of every module of the package, by full name."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = package_files()


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    modules = frozenset([*FILES, NATIVE, EXECUTOR])
    assert violations(module, FILES[module].read_text(encoding="utf-8"), modules) == []


INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(r"(torch|ATen|c10|caffe2|pybind11|numpy)/|Python\.h|pybind11")


def foreign_headers(source: str) -> list[str]:
    """Headers of PyTorch, Python or their bindings that C++ `source` includes."""
    return [header for header in INCLUDE.findall(source) if FOREIGN.match(header)]


NATIVE_FILES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".h", ".cuh", ".cpp", ".cu")
)


@pytest.mark.parametrize("path", NATIVE_FILES, ids=str)
def test_kernels_know_neither_torch_nor_python(path: Path) -> None:
    assert foreign_headers((ROOT / path).read_text(encoding="utf-8")) == []


MODULES = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        *("_cpu", "_simt", "backends", "cli", "fusion", "nn", "numerics", "ops", "sam", "simt"),
        *("ops.a.reference", "ops.a.cpu", "ops.a.triton", "ops.b.reference", "ops.b.cpu"),
        "ops.b.cuda",
        "ops.native",
    )
)


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("backends", "import evsam_kernels.ops", "ops is not below backends"),
        ("ops.a.api", "from evsam_kernels import nn", "nn is not below ops"),
        ("nn.blocks", "from evsam_kernels.fusion import fuse", "fusion is not below nn"),
        ("nn.blocks", "from evsam_kernels.numerics import budget", "numerics is not below nn"),
        ("numerics.cases", "import evsam_kernels.sam", "sam is not below numerics"),
        ("sam", "def f():\n    from evsam_kernels.fusion import fuse", "fusion is not below sam"),
        ("sam.zoo", "import evsam_kernels.cli as cli", "cli is not below sam"),
        ("sam.zoo", "from evsam_kernels import fuse", "the package imports its rooms"),
        ("sam.zoo", "import_module('evsam_kernels.cli')", "cli is not below sam"),
        ("ops.a.reference", "from evsam_kernels.ops import layout", "a reference imports torch"),
        ("ops.a.reference", "import numpy", "a reference imports torch"),
        ("ops.a.cpu", "from evsam_kernels.ops.a import triton", "of their own backend alone"),
        ("ops.a.cpu", "import evsam_kernels.ops.b.cuda", "of their own backend alone"),
        ("ops.a.cpu", "import triton", "only backends, simt and the Triton kernels"),
        ("nn.blocks", "import triton.language as tl", "only backends, simt and the Triton kernels"),
        ("nn.blocks", "from evsam_kernels.ops import native", "serves the C++ launchers"),
        ("nn.blocks", "from evsam_kernels import _cpu", "only backends, ops.native and cli"),
        (
            "simt.compile",
            "from evsam_kernels import _simt",
            "only simt.module imports the executor",
        ),
        ("attic.box", "import evsam_kernels.ops", "attic has no floor"),
    ],
)
def test_the_checker_finds(module: str, source: str, problem: str) -> None:
    (found,) = violations(f"{PACKAGE}.{module}", source, MODULES)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("backends", "from evsam_kernels.backends import build_info"),
        ("backends", "importlib.import_module('evsam_kernels._cpu')"),
        ("ops.a.api", "from evsam_kernels import backends\nimport numpy"),
        ("ops.a.cpu", "from evsam_kernels.ops import native"),
        ("ops.native", "from evsam_kernels import _cpu"),
        ("ops.a.cpu", "from evsam_kernels.ops.b.reference import b"),
        ("ops.a.reference", "import math, torch\nfrom evsam_kernels.ops.b.reference import b"),
        ("ops.a.triton", "import triton\nfrom evsam_kernels import simt"),
        ("ops.a.cpu", "import evsam_kernels.ops.b.cpu"),
        ("simt.compile", "import triton"),
        ("simt.module", "from evsam_kernels import _simt"),
        ("fusion", "from evsam_kernels.nn import layers"),
        ("fusion", "from evsam_kernels.sam import zoo"),
        ("cli.info", "import evsam_kernels\nfrom evsam_kernels import numerics, sam"),
        ("__main__", "from evsam_kernels.cli import main"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source, MODULES) == []


def test_the_checker_of_headers() -> None:
    source = '#include <vector>\n  # include "torch/extension.h"\n#include <Python.h>\n'
    assert foreign_headers(source) == ["torch/extension.h", "Python.h"]
    assert foreign_headers('#include "evsam/isa.h"\n// torch/extension.h\n') == []
