"""`import evsam_kernels` needs neither what is optional nor anything that was compiled."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import evsam_kernels

OPTIONAL = ("matplotlib", "pycocotools", "rich", "safetensors", "scipy", "triton")

# A fresh process, because this one has imported the package already. Modules that torch happens to
# have imported by itself are none of ours.
IMPORT_WITHOUT = """
import sys
import numpy, torch

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "evsam_kernels._cpu" or name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

already = set(sys.modules)
sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str, blocked: tuple[str, ...] = OPTIONAL) -> subprocess.CompletedProcess[str]:
    program = IMPORT_WITHOUT.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_package_imports_with_everything_optional_blocked() -> None:
    result = run_blocked("import evsam_kernels\nprint(evsam_kernels.__version__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == evsam_kernels.__version__


def test_importing_the_package_imports_nothing_optional() -> None:
    code = """
import evsam_kernels
print(sorted({name.split(".")[0] for name in set(sys.modules) - already}))
print("evsam_kernels._cpu" in sys.modules)
"""
    result = run_blocked(code, blocked=())
    assert result.returncode == 0, result.stderr
    imported, native = result.stdout.splitlines()
    assert "'evsam_kernels'" in imported
    assert [name for name in OPTIONAL if f"'{name}'" in imported] == []
    assert native == "False"


def test_operations_run_without_compiled_kernels() -> None:
    code = """
import evsam_kernels as ek
x = torch.randn(1, 4, 2, 2)
print(tuple(ek.ops.layer_norm_2d(x).shape))
try:
    ek.ops.layer_norm_2d(x, backend="cpu")
except ek.BackendUnavailableError as error:
    print(error)
"""
    result = run_blocked(code)
    assert result.returncode == 0, result.stderr
    shape, error = result.stdout.splitlines()
    assert shape == "(1, 4, 2, 2)"
    assert "'cpu' is not available here" in error


@pytest.mark.parametrize("name", ["evsam_kernels._cpu", "scipy"])
def test_the_blocker_blocks(name: str) -> None:
    result = run_blocked(f"import evsam_kernels\nimport {name}")
    assert f"{name} is blocked" in result.stderr


def test_version_is_that_of_the_installed_distribution() -> None:
    assert importlib.metadata.version("evsam-kernels") == evsam_kernels.__version__
