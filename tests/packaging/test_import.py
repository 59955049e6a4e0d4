"""`import evsam_kernels` in a fresh process: needs and imports nothing optional."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = ("triton", "matplotlib", "pycocotools", "scipy", "evsam_kernels._cpu")

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {OPTIONAL}):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_nothing_optional():
    imported = run("import sys, evsam_kernels; print(*sys.modules)").split()
    lazily = (*OPTIONAL, "rich", "safetensors")
    ours = run("import sys, torch; print(*sys.modules)").split()
    found = {name.split(".")[0] for name in set(imported) - set(ours)}
    assert "evsam_kernels" in found
    assert not found & {name for name in lazily if "." not in name}
    assert "evsam_kernels._cpu" not in imported


def test_works_with_everything_optional_blocked():
    run(
        BLOCK
        + """
import torch, evsam_kernels as ek
y = ek.fuse(ek.nn.EfficientViTBlock(64).eval())(torch.randn(1, 64, 4, 4))
assert y.shape == (1, 64, 4, 4)
try:
    ek.ops.layer_norm_2d(y, backend="cpu")
except ek.BackendUnavailableError as error:
    assert "'cpu' is not available here" in str(error), error
else:
    raise SystemExit("the blocked backend ran")
"""
    )
