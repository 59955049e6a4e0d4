"""Who may import whom: layers point one way, formulas import PyTorch alone, kernels stay apart."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "evsam_kernels"

LAYERS = ("backends", "ops", "nn", "fusion", "sam", "numerics", "cli")
"""From the bottom up: a layer may import itself and those before it."""

BACKENDS = ("reference", "cpu", "triton", "cuda")


def imports_of(source: str) -> set[str]:
    """Full names of the modules a file imports, at its top and inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def violations(path: str, source: str) -> list[str]:
    """What a file of the package, `path` from the package's folder, imports against the rules."""
    parts = Path(path).with_suffix("").parts
    imported = imports_of(source)
    found = []
    layer = parts[0]
    if layer in LAYERS:
        higher = LAYERS[LAYERS.index(layer) + 1 :]
        found += [
            f"{layer} imports {name}"
            for name in imported
            if any(f"{name}.".startswith(f"evsam_kernels.{above}.") for above in higher)
        ]
    kind = parts[-1]
    if layer == "ops" and len(parts) == 3 and kind in BACKENDS:
        others = [name for name in BACKENDS if name not in (kind, "reference")]
        found += [
            f"{kind} imports {name}"
            for name in imported
            if re.match(rf"evsam_kernels\.ops\.\w+\.({'|'.join(others)})\b", name)
        ]
        if kind == "reference":
            allowed = r"(__future__|collections|functools|math|torch)\b"
            sibling = r"evsam_kernels\.ops\.\w+\.reference\b"
            found += [
                f"reference imports {name}"
                for name in imported
                if not re.match(f"{allowed}|{sibling}", name)
            ]
    may_use_triton = layer == "simt" or (layer == "ops" and kind == "triton")
    if not may_use_triton and any(name.split(".")[0] == "triton" for name in imported):
        found.append("triton is imported outside ops/*/triton.py and simt/")
    return found


@pytest.mark.parametrize(
    "path", [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]
)
def test_rules_hold(path):
    assert violations(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    "path", [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*"))]
)
def test_kernels_know_neither_torch_nor_python(path):
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)', (ROOT / path).read_text())
    assert not [name for name in included if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", name)]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("backends/x.py", "from evsam_kernels import ops"),
        ("ops/registry.py", "import evsam_kernels.nn.layers"),
        ("nn/layers.py", "def f():\n    from evsam_kernels.sam import model"),
        ("sam/model.py", "from evsam_kernels.cli.output import progress"),
        ("fusion.py", "from evsam_kernels.sam.model import EfficientViTSam"),
        ("ops/conv_act/reference.py", "from evsam_kernels.ops.checks import require"),
        ("ops/conv_act/reference.py", "import numpy"),
        ("ops/mbconv/cpu.py", "from evsam_kernels.ops.mbconv.cuda import mbconv"),
        ("ops/mbconv/cuda.py", "from evsam_kernels.ops.conv_act import triton"),
        ("ops/mbconv/api.py", "import triton.language as tl"),
    ],
)
def test_a_violation_is_found(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/mbconv/reference.py", "from evsam_kernels.ops.conv_act.reference import conv_act"),
        ("ops/mbconv/triton.py", "import triton"),
        ("nn/layers.py", "from evsam_kernels import ops"),
        ("cli/segment.py", "import evsam_kernels"),
    ],
)
def test_what_is_allowed_is_not_found(path, source):
    assert not violations(path, source)
