"""Says on what a result was computed: processor, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import evsam_kernels

_TELLING_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
_ROOT = Path(evsam_kernels.__file__).parents[1]


@dataclass(frozen=True)
class Machine:
    """The machine and the software that a number depends on.

    Attributes:
        processor: the CPU's name.
        instruction_sets: those of the CPU's vector extensions that matter to the kernels.
        cores: CPUs this process may run on.
        threads: threads PyTorch uses.
        torch: PyTorch's version.
        python: Python's version.
        system: operating system and architecture.
        commit: of the checkout, with "+changes" where files differ from it; "" without a checkout.
        gpu: the first GPU that PyTorch finds; "" where it finds none.
    """

    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    threads: int
    torch: str
    python: str
    system: str
    commit: str
    gpu: str = ""

    def __str__(self) -> str:
        parts = [
            *([self.gpu] if self.gpu else []),
            self.processor,
            f"{self.cores} {'core' if self.cores == 1 else 'cores'}",
            f"{self.threads} {'thread' if self.threads == 1 else 'threads'}",
            f"torch {self.torch}",
            f"Python {self.python}",
            f"evsam-kernels {evsam_kernels.__version__}",
        ]
        return ", ".join([*parts, f"commit {self.commit}"] if self.commit else parts)


def machine() -> Machine:
    """The machine this process runs on."""
    processor, instruction_sets = _cpu()
    return Machine(
        processor=processor,
        instruction_sets=instruction_sets,
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        commit=_commit(),
        gpu=_gpu(),
    )


def _gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    gpu = torch.cuda.get_device_properties(0)
    return (
        f"{gpu.name} (compute capability {gpu.major}.{gpu.minor}, "
        f"{gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda})"
    )


def _cpu() -> tuple[str, tuple[str, ...]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.machine()
    return name, tuple(flag for flag in _TELLING_INSTRUCTION_SETS if flag in flags)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str:
    # Not for a package inside another project's repository, such as one installed in its venv.
    if not (_ROOT / ".git").exists():
        return ""
    commit = _git("rev-parse", "--short=10", "HEAD")
    changed = commit and _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
