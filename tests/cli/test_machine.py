"""The line that says on what a result was computed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from evsam_kernels.cli import machine as module
from evsam_kernels.cli.machine import Machine, machine


def test_the_machine_is_described() -> None:
    here = machine()
    assert here.processor
    assert here.cores >= 1
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__


def test_the_line_holds_what_a_number_depends_on() -> None:
    line = str(Machine("CPU 9000", ("avx2",), 4, 2, "2.9", "3.12.1", "Linux x86_64", "abc123"))
    for part in ("CPU 9000", "4 cores", "2 threads", "torch 2.9", "Python 3.12.1", "commit abc123"):
        assert part in line
    line = str(Machine("CPU 9000", (), 1, 1, "2.9", "3.12.1", "Linux x86_64", ""))
    assert "1 core, 1 thread," in line
    assert "commit" not in line


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            "processor : 0\nmodel name\t: CPU 9000\nflags\t\t: fpu avx2 fma avx512f\n\n"
            "processor : 1\nmodel name\t: Other\nflags\t\t: fpu\n",
            ("CPU 9000", ("avx2", "fma", "avx512f")),
        ),
        ("processor : 0\nFeatures\t: fp asimd sve\n", ("aarch64", ("asimd", "sve"))),
    ],
)
def test_cpuinfo_is_read(
    cpuinfo: str,
    expected: tuple[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert module._cpu() == expected


def test_without_cpuinfo_the_platform_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    assert module._cpu() == ("arm64", ())


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_the_checkouts_and_changes_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "One file")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert module._commit() and commit.startswith(module._commit())
    (tmp_path / "file").write_text("two")
    assert module._commit().endswith("+changes")


def test_another_projects_commit_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "Nothing")
    inner = tmp_path / "site-packages"
    inner.mkdir()
    monkeypatch.setattr(module, "_ROOT", inner)
    assert module._commit() == ""


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._commit() == ""
