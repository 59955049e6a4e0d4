"""Which cores a benchmark runs on: one thread each, no two on the same physical core."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def physical_cores() -> tuple[int, ...]:
    """One of the logical CPUs that this process may use per physical core, in order."""
    usable = sorted(os.sched_getaffinity(0))
    first: dict[str, int] = {}
    for cpu in usable:
        first.setdefault(_siblings(cpu), cpu)
    return tuple(first.values())


def _siblings(cpu: int) -> str:
    try:
        return Path(_TOPOLOGY.format(cpu)).read_text().strip()
    except OSError:
        return str(cpu)  # Without a topology every CPU counts as a core.
