"""setup.py builds kernels or leaves them out as the environment says, and records which."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

import evsam_kernels
from evsam_kernels.backends import build_info

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py needs of this checkout, with a package of one room."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, tmp_path / name)
    package = tmp_path / "evsam_kernels"
    package.mkdir()
    shutil.copy(ROOT / "evsam_kernels/py.typed", package)
    (package / "__init__.py").touch()
    shutil.copytree(ROOT / "evsam_kernels/simt", package / "simt")
    return tmp_path


def run_setup(
    checkout: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=checkout,
        env={**os.environ, "EVSAM_BUILD_CPU": "auto", "EVSAM_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


def record(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "evsam_kernels/build_info.json").read_text())
    return facts


def broken_compiler(folder: Path) -> str:
    """A compiler that is there and fails."""
    compiler = folder / "c++"
    compiler.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_auto_without_a_working_compiler_says_why(checkout: Path) -> None:
    compiler = broken_compiler(checkout)
    result = run_setup(checkout, "build_ext", "--build-lib", "lib", CXX=compiler)
    assert result.returncode == 0, result.stderr
    reason = f"the C++ compiler {compiler} does not work: this compiler is broken"
    assert f"leaving out the C++ kernels: {reason}" in result.stderr
    assert record(checkout / "lib")["cpu_built"] is False
    assert record(checkout / "lib")["cpu_reason"] == reason


def test_auto_without_any_compiler_says_what_to_install(checkout: Path) -> None:
    result = run_setup(checkout, "build_ext", "--build-lib", "lib", CXX="", PATH="/nowhere")
    assert result.returncode == 0, result.stderr
    assert "install g++ or clang++, or set CXX" in record(checkout / "lib")["cpu_reason"]


def test_a_build_that_was_asked_for_fails_loudly(checkout: Path) -> None:
    arguments = ("build_ext", "--build-lib", "lib")
    result = run_setup(checkout, *arguments, CXX="/nowhere/c++", EVSAM_BUILD_CPU="1")
    assert result.returncode != 0
    assert "EVSAM_BUILD_CPU=1, but the C++ compiler /nowhere/c++ does not work" in result.stderr
    assert not (checkout / "lib/evsam_kernels/build_info.json").exists()


def test_unknown_setting_is_an_error_naming_the_known(checkout: Path) -> None:
    result = run_setup(checkout, "build_ext", "--build-lib", "lib", EVSAM_BUILD_CPU="yes")
    assert result.returncode != 0
    assert "EVSAM_BUILD_CPU must be 0, 1 or auto, got 'yes'" in result.stderr


def test_leaving_out_removes_what_an_earlier_build_left(checkout: Path) -> None:
    stale = checkout / f"evsam_kernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    result = run_setup(checkout, "build_ext", "--inplace", EVSAM_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    assert not stale.exists()
    assert record(checkout)["cpu_reason"] == "EVSAM_BUILD_CPU=0"


def test_wheel_carries_the_record(checkout: Path) -> None:
    result = run_setup(checkout, "bdist_wheel", "--dist-dir", "dist", EVSAM_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        facts = json.loads(archive.read("evsam_kernels/build_info.json"))
    assert facts == {
        "version": evsam_kernels.__version__,
        "cpu_built": False,
        "cpu_reason": "EVSAM_BUILD_CPU=0",
        "cuda_built": False,
        "cuda_reason": "EVSAM_BUILD_CUDA=0",
    }
    data = {"evsam_kernels/simt/gpus.json", "evsam_kernels/simt/replay.json"}
    assert {"evsam_kernels/py.typed", *data} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp"))]
    assert build_info.BuildInfo(**facts).cpu_reason == "EVSAM_BUILD_CPU=0"


TINY = 'extern "C" __global__ void tiny(float* x) { x[threadIdx.x] *= 2; }\n'


@pytest.fixture
def tiny(checkout: Path) -> Path:
    """The checkout with one small CUDA source."""
    shutil.rmtree(checkout / "csrc/cuda")
    (checkout / "csrc/cuda").mkdir()
    (checkout / "csrc/cuda/tiny.cu").write_text(TINY)
    (checkout / "evsam_kernels/cuda").mkdir()
    (checkout / "evsam_kernels/cuda/__init__.py").touch()
    return checkout


def no_nvcc(checkout: Path) -> dict[str, str]:
    """An environment whose nvcc does not work, and is the first one found."""
    compiler = checkout / "toolkit/bin/nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\necho 'this nvcc is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return {"CUDA_HOME": str(checkout / "toolkit")}


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA publishes nvcc for Linux")
def test_a_wheel_carries_images_and_a_source_archive_passes_them_on(tiny: Path) -> None:
    only_cuda = {"EVSAM_BUILD_CPU": "0", "EVSAM_BUILD_CUDA": "1"}
    result = run_setup(tiny, "build_ext", "--inplace", "sdist", **only_cuda)
    assert result.returncode == 0, result.stderr
    images = tiny / "evsam_kernels/cuda/images"
    ptx = (images / "tiny.ptx").read_text()
    assert ".version 7.8\n.target sm_80\n" in ptx
    assert str(tiny) not in ptx
    facts = record(tiny)
    assert facts["cuda_built"] and facts["cuda_compiler"].startswith("nvcc ")
    names = {"tiny.ptx", "manifest.json"}
    names |= {f"tiny.sm_{arch}.cubin" for arch in facts["cuda_architectures"]}
    assert {path.name for path in images.iterdir()} == names

    # Where nvcc is nowhere, what came along in the archive is taken.
    (archive,) = (tiny / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tiny / "unpacked", filter="data")
    (unpacked,) = (tiny / "unpacked").iterdir()
    toolchain = unpacked / "evsam_kernels/simt/toolchain.py"
    toolchain.write_text(toolchain.read_text().replace('"bin", tool', '"bin", "no_such_tool"'))
    hidden = toolchain.read_text().replace("shutil.which(tool)", "None")
    toolchain.write_text(hidden.replace('_package_folders("nvidia")', "()"))
    result = run_setup(unpacked, "bdist_wheel", "--dist-dir", "dist", **only_cuda)
    assert result.returncode == 0, result.stderr
    (wheel,) = (unpacked / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as contents:
        packed = set(contents.namelist())
        assert contents.read("evsam_kernels/cuda/images/tiny.ptx").decode() == ptx
    assert {f"evsam_kernels/cuda/images/{name}" for name in names} <= packed

    # Not where they are of other sources.
    (unpacked / "csrc/cuda/tiny.cu").write_text(TINY.replace("2", "3"))
    result = run_setup(unpacked, "build_ext", "--inplace", **only_cuda)
    assert result.returncode != 0
    assert "EVSAM_BUILD_CUDA=1, but nvcc is not installed: install the CUDA" in result.stderr
    result = run_setup(unpacked, "build_ext", "--inplace", EVSAM_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    assert not (unpacked / "evsam_kernels/cuda/images").exists()


def test_a_broken_nvcc_is_named(tiny: Path) -> None:
    settings = {"EVSAM_BUILD_CPU": "0", **no_nvcc(tiny)}
    result = run_setup(tiny, "build_ext", "--inplace", EVSAM_BUILD_CUDA="auto", **settings)
    assert result.returncode == 0, result.stderr
    assert "nvcc does not work: this nvcc is broken" in record(tiny)["cuda_reason"]
    result = run_setup(tiny, "build_ext", "--inplace", EVSAM_BUILD_CUDA="1", **settings)
    assert "EVSAM_BUILD_CUDA=1, but the CUDA compiler" in result.stderr


def read_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any] | None
) -> build_info.BuildInfo:
    path = folder / "build_info.json"
    if content is not None:
        path.write_text(json.dumps(content))
    monkeypatch.setattr(build_info, "_RECORD", path)
    return build_info.read.__wrapped__()


def test_record_of_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        **{"version": "0.1.0", "cpu_built": True, "compiler": "g++ 12", "flags": "-O3"},
        "isa_flags": {"portable": "", "avx2": "-mavx2"},
        **{"cuda_built": True, "cuda_compiler": "nvcc 13.0", "cuda_architectures": [80, 90]},
    }
    info = read_record(tmp_path, monkeypatch, content)
    assert info.cpu == "built with g++ 12 for portable, avx2"
    assert info.cuda == "built with nvcc 13.0: PTX, cubin for sm_80, cubin for sm_90"
    assert info.cpu_reason == info.cuda_reason == ""


def test_without_a_record_nothing_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = read_record(tmp_path, monkeypatch, None)
    assert not info.cpu_built
    reason = "not built: the package runs from a checkout that was never installed"
    assert str(info) == f"C++ kernels: {reason}\nCUDA kernels: {reason}"
