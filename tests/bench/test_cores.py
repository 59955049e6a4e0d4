"""Which cores are taken: one per physical core, of those the process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import cores


@pytest.fixture
def topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four CPUs that the process may use, 0, 1, 4 and 5; a folder for their siblings' lists."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 4, 1, 0})
    monkeypatch.setattr(cores, "_TOPOLOGY", str(tmp_path / "cpu{}"))
    return tmp_path


def test_siblings_are_left_out(topology: Path) -> None:
    for cpu, siblings in ((0, "0,4"), (4, "0,4"), (1, "1,5"), (5, "1,5")):
        (topology / f"cpu{cpu}").write_text(f"{siblings}\n")
    assert cores.physical_cores() == (0, 1)


def test_without_a_topology_every_cpu_counts(topology: Path) -> None:
    assert cores.physical_cores() == (0, 1, 4, 5)


def test_this_machine() -> None:
    found = cores.physical_cores()
    assert found
    assert set(found) <= os.sched_getaffinity(0)
