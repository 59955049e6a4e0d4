"""NVIDIA's tools are found where people have them, and what they say is passed on."""

from __future__ import annotations

from pathlib import Path

import pytest

from evsam_kernels.simt import toolchain


def install(folder: Path, tool: str, script: str = "true") -> Path:
    """A program called `tool` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tool
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path.resolve()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has none of the tools."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "_package_folders", lambda package: [])
    monkeypatch.setattr(toolchain.shutil, "which", lambda tool: None)
    return monkeypatch


@pytest.mark.parametrize("tool", ["nvcc", "ptxas", "cuobjdump", "nvdisasm"])
def test_a_missing_tool_comes_with_the_remedy(tool: str, nowhere: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        toolchain.ToolNotFoundError, match=rf"{tool} is not installed: .*evsam-kernels\[cuda\]"
    ):
        toolchain.find(tool)


def test_the_order_of_the_places(tmp_path: Path, nowhere: pytest.MonkeyPatch) -> None:
    home = install(tmp_path / "home" / "bin", "ptxas")
    on_path = install(tmp_path / "path", "ptxas")
    package = install(tmp_path / "nvidia" / "cu13" / "bin", "ptxas")
    triton = install(tmp_path / "triton" / "backends" / "nvidia" / "bin", "ptxas")
    nowhere.setenv("CUDA_HOME", str(tmp_path / "home"))
    nowhere.setattr(toolchain.shutil, "which", lambda tool: str(on_path))
    nowhere.setattr(toolchain, "_package_folders", lambda package: [tmp_path / package])
    assert toolchain.find("ptxas") == [home, on_path, package, triton]
    assert toolchain.find("ptxas", prefer="triton") == [triton, home, on_path, package]
    (home.parent / "ptxas").chmod(0o644)
    assert toolchain.find("ptxas") == [on_path, package, triton]


def test_a_newer_copy_is_tried_where_the_first_refuses(
    tmp_path: Path, nowhere: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "old" / "bin", "ptxas", "echo Unsupported .version 9.0; exit 3")
    nowhere.setenv("CUDA_HOME", str(tmp_path / "old"))
    with pytest.raises(toolchain.ToolError, match=r"(?s)3:\nUnsupported .version 9.0"):
        toolchain.run("ptxas", ["kernel.ptx"])
    install(tmp_path / "new" / "bin", "ptxas", 'echo "assembled $1"')
    nowhere.setenv("CUDA_PATH", str(tmp_path / "new"))
    assert toolchain.run("ptxas", ["kernel.ptx"]) == "assembled kernel.ptx\n"


def test_packages_are_looked_up_without_importing_them() -> None:
    assert toolchain._package_folders("no_such_package") == []
    folders = toolchain._package_folders("torch")
    assert [folder.name for folder in folders] == ["torch"]
