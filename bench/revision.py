"""Measures an earlier revision of the project: the same command, run in a checkout of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import report
from evsam_kernels.cli.errors import CommandError

_ROOT = Path(__file__).parents[1]
_SOURCES = ("csrc", "python", "setup.py")
"""What the compiled modules are made of."""
_BUILT = ("*.so", "build_info.json", "cuda/images")
"""Where they are, in the package."""


def measure(revision: str, arguments: Sequence[str], root: Path = _ROOT) -> report.Result:
    """What `python -m bench *arguments` measures of a revision, now and on this machine.

    Its compiled modules are built, or taken from here where their sources are the same.

    Args:
        revision: as git names it.
        arguments: of a command that takes --json.
        root: the checkout whose revision it is.

    Raises:
        CommandError: it is no revision, cannot be built, or measures nothing.
    """
    known = _run("git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", cwd=root)
    if known.returncode:
        raise CommandError(f"--compare: {revision} is neither a file nor a git revision")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _require(_run("git", "worktree", "add", "--detach", str(tree), revision, cwd=root), "git")
        try:
            return _measure(revision, tree, arguments, root)
        finally:
            _run("git", "worktree", "remove", "--force", str(tree), cwd=root)


def _measure(revision: str, tree: Path, arguments: Sequence[str], root: Path) -> report.Result:
    same = _run("git", "diff", "--quiet", revision, "--", *_SOURCES, cwd=root).returncode == 0
    if same:
        _take_built(root / "evsam_kernels", tree / "evsam_kernels")
    else:
        print(f"building {revision} ...", file=sys.stderr)
        built = _run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree)
        _require(built, f"{revision} cannot be built")
    result = tree / "measured.json"
    print(f"measuring {revision} ...", file=sys.stderr)
    command = (sys.executable, "-m", "bench", *arguments, "--json", str(result))
    _require(_run(*command, cwd=tree), f"{revision} was not measured")
    return report.load(result)


def _take_built(package: Path, other: Path) -> None:
    for pattern in _BUILT:
        for path in package.glob(pattern):
            target = other / path.relative_to(package)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copy2(path, target)


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def _require(done: subprocess.CompletedProcess[str], what: str) -> None:
    """Raise CommandError with the last words of a command that failed."""
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise CommandError(f"--compare: {what}: {last}")
