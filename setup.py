"""Builds the C++ extension modules and the CUDA kernels; pyproject.toml declares everything else.

The modules are `_cpu`, the kernels, and `_simt`, the executor of GPU kernels. EVSAM_BUILD_CPU says
what to do about them: 0 leaves them out, 1 builds them or fails, auto (the default) builds them
where there is a working compiler and otherwise says why not. EVSAM_BUILD_CUDA says the same of the
CUDA kernels, which nvcc compiles to files that need no nvcc where they are used. What happened is
recorded in `evsam_kernels/build_info.json`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd "
    # A product's inner loop that begins in the middle of a cache line takes up to 5 % longer.
    "-falign-functions=64 -falign-loops=64 "
    "-Wall -Wextra -Icsrc/include"
)
# Results of the executor do not depend on what the processor can fuse.
SIMT_FLAGS = "-std=c++20 -ffp-contract=off"
LINK_FLAGS = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"

# Slowest first. Every kernel is compiled once for each, with EVSAM_ISA naming the namespace of
# that copy; csrc/cpu/baseline/dispatch.cpp picks one at run time.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
ISA_FLAGS = {
    "portable": "",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}


NVCC_FLAGS = "-std=c++20"
# The least that the instructions need, and compute capabilities that get machine code of their own.
PTX_VERSION = "7.0"
PTX_ARCH = 80
CUBIN_ARCHS = (80, 86, 89, 90, 100, 120)


class CannotBuildError(Exception):
    """Kernels cannot be built here; the message says what is missing."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler that was tried out, and the flags it was found to accept."""

    cxx: str
    version: str
    flags: str
    isa_flags: dict[str, str]


def complaint(cxx: str, flags: str, source: str) -> str:
    """What the compiler says against building a shared library from `source`; "" for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source + "\n")
        options = shlex.split(f"{cxx} {CXX_FLAGS} {flags} {LINK_FLAGS}")
        try:
            result = subprocess.run(
                [*options, path, "-o", path.with_suffix(".so")], capture_output=True, text=True
            )
        except OSError as error:
            return str(error)
    said = result.stderr.strip() or f"it exits with {result.returncode}"
    return said.splitlines()[0] if result.returncode else ""


def find_toolchain() -> Toolchain:
    """The C++ compiler, $CXX or the first of c++, g++ and clang++, tried out.

    Raises:
        CannotBuildError: there is none that works, or something else that a build needs is missing.
    """
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if cxx is None:
        raise CannotBuildError("there is no C++ compiler: install g++ or clang++, or set CXX")
    problem = complaint(cxx, "", "#include <vector>")
    if problem:
        raise CannotBuildError(f"the C++ compiler {cxx} does not work: {problem}")
    problem = complaint(cxx, SIMT_FLAGS, "#include <bit>\nint zeros = std::countr_zero(8u);")
    if problem:
        raise CannotBuildError(f"the C++ compiler {cxx} is too old for C++20: {problem}")
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            raise CannotBuildError(f"{package} is missing: pip install {package}")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise CannotBuildError("Python.h is missing: install python3-dev")
    no_openmp = complaint(cxx, "-fopenmp", "#include <omp.h>\nint n = omp_get_max_threads();")
    answer = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True)
    x86 = "#include <immintrin.h>"
    return Toolchain(
        cxx,
        answer.stdout.partition("\n")[0],
        CXX_FLAGS if no_openmp else f"{CXX_FLAGS} -fopenmp",
        {isa: own for isa, own in ISA_FLAGS.items() if not own or not complaint(cxx, own, x86)},
    )


def decide(setting: str) -> Toolchain | str:
    """The toolchain to build the C++ kernels with, or the reason for leaving them out.

    Raises:
        SystemExit: `setting` is not 0, 1 or auto, or it is 1 and they cannot be built.
    """
    if setting not in ("0", "1", "auto"):
        raise SystemExit(f"EVSAM_BUILD_CPU must be 0, 1 or auto, got {setting!r}")
    if setting == "0":
        return "EVSAM_BUILD_CPU=0"
    try:
        return find_toolchain()
    except CannotBuildError as error:
        if setting == "1":
            raise SystemExit(f"EVSAM_BUILD_CPU=1, but {error}") from None
        return str(error)


# What to compile: the name of the variant, the source and its own flags.
Unit = tuple[str, Path, str]


def units(toolchain: Toolchain) -> list[Unit]:
    """What the kernels are made of, apart from the bindings."""
    folder = Path("csrc/cpu")
    compiled_in = " ".join(f"-DEVSAM_WITH_{isa.upper()}" for isa in toolchain.isa_flags)
    baseline = sorted(folder.glob("baseline/*.cpp"))
    return [("baseline", source, compiled_in) for source in baseline] + [
        (isa, kernel, f"-DEVSAM_ISA={isa} {flags}")
        for kernel in sorted(folder.glob("*.cpp"))
        for isa, flags in toolchain.isa_flags.items()
    ]


def simt_units() -> list[Unit]:
    """What the executor is made of, apart from the bindings."""
    folder = Path("csrc/simt")
    return [
        (source.parent.name, source, f"-Icsrc/simt {SIMT_FLAGS}")
        for source in sorted(folder.rglob("*.cpp"))
    ]


def modules(toolchain: Toolchain) -> dict[str, list[Unit]]:
    """What the extension modules are made of."""
    import pybind11

    headers = [sysconfig.get_path("include"), pybind11.get_include()]
    python = shlex.join(f"-isystem{path}" for path in headers)
    simt = f"{python} -Icsrc/simt {SIMT_FLAGS}"
    return {
        "_cpu": [*units(toolchain), ("python", Path("python/cpu.cpp"), python)],
        "_simt": [*simt_units(), ("python", Path("python/simt.cpp"), simt)],
    }


def compile_modules(toolchain: Toolchain) -> dict[str, Path]:
    """Compile what changed since the last time; returns the path of each module."""
    folder = Path("build", f"native{sysconfig.get_config_var('EXT_SUFFIX')}")
    command = f"{toolchain.cxx} {toolchain.flags}"
    rules = [f"builddir = {folder}", "rule compile", "  depfile = $out.d", "  deps = gcc"]
    rules += [f"  command = {command} $flags -MMD -MF $out.d -c $in -o $out"]
    rules += ["rule link", f"  command = {command} {LINK_FLAGS} $in -o $out"]
    libraries = {}
    for name, parts in modules(toolchain).items():
        objects = []
        for variant, source, flags in parts:
            objects.append(f"{folder}/{name}/{variant}/{source.stem}.o")
            rules += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
        libraries[name] = folder / f"{name}.so"
        rules += [f"build {libraries[name]}: link {' '.join(objects)}"]
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("build.ninja").write_text("\n".join([*rules, ""]))
    subprocess.run([sys.executable, "-m", "ninja", "-f", folder / "build.ninja"], check=True)
    return libraries


def find_nvcc() -> Path:
    """NVIDIA's compiler, of the system or of PyPI.

    Raises:
        CannotBuildError: there is none, or no ninja.
    """
    # The package itself cannot be imported before it is built; this file of it stands alone.
    path = Path("evsam_kernels/simt/toolchain.py")
    spec = importlib.util.spec_from_file_location("toolchain", path)
    assert spec is not None and spec.loader is not None
    toolchain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolchain)
    if importlib.util.find_spec("ninja") is None:
        raise CannotBuildError("ninja is missing: pip install ninja")
    try:
        return toolchain.find("nvcc")[0]
    except toolchain.ToolNotFoundError as error:
        raise CannotBuildError(str(error)) from error


def compile_cuda(setting: str) -> list[Path] | str:
    """Compile the CUDA kernels as far as they changed; the files, or the reason for leaving them.

    Raises:
        SystemExit: `setting` is not 0, 1 or auto, or it is 1 and they cannot be built.
    """
    if setting not in ("0", "1", "auto"):
        raise SystemExit(f"EVSAM_BUILD_CUDA must be 0, 1 or auto, got {setting!r}")
    if setting == "0":
        return "EVSAM_BUILD_CUDA=0"
    try:
        nvcc = find_nvcc()
    except CannotBuildError as error:
        if setting == "1":
            raise SystemExit(f"EVSAM_BUILD_CUDA=1, but {error}") from None
        return str(error)
    folder = Path("build", "cuda")
    rules = [f"builddir = {folder}", "rule nvcc", "  depfile = $out.d", "  deps = gcc"]
    rules += [f"  command = {nvcc} {NVCC_FLAGS} $flags -MD -MF $out.d -o $out $in"]
    images = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        outputs = {f"{source.stem}.ptx": f"-ptx -arch=sm_{PTX_ARCH}"}
        outputs |= {f"{source.stem}.sm_{n}.cubin": f"-cubin -arch=sm_{n}" for n in CUBIN_ARCHS}
        for name, flags in outputs.items():
            images.append(folder / name)
            rules += [f"build {images[-1]}: nvcc {source}", f"  flags = {flags}"]
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("build.ninja").write_text("\n".join([*rules, ""]))
    try:
        subprocess.run([sys.executable, "-m", "ninja", "-f", folder / "build.ninja"], check=True)
    except subprocess.CalledProcessError as error:
        if setting == "1":
            raise SystemExit("EVSAM_BUILD_CUDA=1, but nvcc fails: see above") from error
        return f"{nvcc} fails"
    return images


def install_images(images: list[Path], folder: Path) -> None:
    """Put compiled CUDA kernels, and no older ones, into the package."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for image in images:
        if image.suffix == ".ptx":
            # nvcc writes its own version, which older drivers do not know.
            text = re.sub(
                r"^\.version .*", f".version {PTX_VERSION}", image.read_text(), flags=re.M
            )
            folder.joinpath(image.name).write_text(text)
        else:
            shutil.copy(image, folder)


class BuildNative(build_ext):
    """Builds the C++ extension modules and CUDA kernels or leaves them out, and records which."""

    def run(self) -> None:
        images = compile_cuda(os.environ.get("EVSAM_BUILD_CUDA", "auto"))
        decision = decide(os.environ.get("EVSAM_BUILD_CPU", "auto"))
        built = isinstance(decision, Toolchain)
        record = {
            "version": self.distribution.get_version(),
            "cpu_built": built,
            "cuda_reason": images if isinstance(images, str) else "",
        }
        fresh = compile_modules(decision) if built else {}
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            # Unlinked and not overwritten: a process may be running the old one.
            library.unlink(missing_ok=True)
            if built:
                shutil.copy(fresh[extension.name.rpartition(".")[2]], library)
        if built:
            record |= {"compiler": decision.version, "flags": decision.flags}
            record["isa_flags"] = decision.isa_flags
        else:
            record["cpu_reason"] = decision
            print(f"evsam-kernels: leaving out the C++ kernels: {decision}", file=sys.stderr)
        install_images(images if isinstance(images, list) else [], library.parent / "cuda/images")
        if isinstance(images, str):
            print(f"evsam-kernels: leaving out the CUDA kernels: {images}", file=sys.stderr)
        (library.parent / "build_info.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("evsam_kernels._cpu", ["python/cpu.cpp"]),
            Extension("evsam_kernels._simt", ["python/simt.cpp"]),
        ],
        cmdclass={"build_ext": BuildNative},
    )
