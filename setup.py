"""Builds the C++ modules and the CUDA images; pyproject.toml declares the rest of the package.

The modules are `_cpu`, the kernels, and `_simt`, the executor of GPU kernels. The images are what
drivers load of csrc/cuda: PTX, and cubins assembled from that same PTX. EVSAM_BUILD_CPU says what
to do about the modules and EVSAM_BUILD_CUDA about the images: 0 leaves them out, 1 builds them or
fails, auto (the default) builds them where there is a working compiler and otherwise says why not.
What happened is recorded in `evsam_kernels/build_info.json`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

Found = TypeVar("Found")

CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd "
    # A product's inner loop that begins in the middle of a cache line takes up to 5 % longer.
    "-falign-functions=64 -falign-loops=64 "
    "-Wall -Wextra -Icsrc/include"
)
# Results of the executor do not depend on what the processor can fuse.
SIMT_FLAGS = "-std=c++20 -ffp-contract=off"
LINK_FLAGS = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"

# The plainest first. Every kernel is compiled once for each, with EVSAM_ISA naming the namespace of
# that copy; csrc/cpu/baseline/dispatch.cpp picks one at run time.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
ISA_FLAGS = {
    "portable": "",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}

# Line tables cost nothing at run time, and have the executor's reports name lines of the source.
NVCC_FLAGS = "-ptx -std=c++20 -arch=sm_80"
# nvcc writes the newest version that it knows, which drivers older than itself refuse. This one is
# that of CUDA 11.8, the oldest that a PyTorch we support comes with; ptxas holds the kernels to it.
PTX_VERSION = "7.8"
CUBIN_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CUDA_SOURCES = Path("csrc/cuda")
CUDA_IMAGES = Path("evsam_kernels/cuda/images")


class CannotBuildError(Exception):
    """Something cannot be built here; the message says what is missing."""


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


def decide(variable: str, find: Callable[[], Found]) -> Found | str:
    """The compiler that `find` finds, or the reason for leaving out what it would compile.

    Raises:
        SystemExit: the environment variable is not 0, 1 or auto, or it is 1 and there is none.
    """
    setting = os.environ.get(variable, "auto")
    if setting not in ("0", "1", "auto"):
        raise SystemExit(f"{variable} must be 0, 1 or auto, got {setting!r}")
    if setting == "0":
        return f"{variable}=0"
    try:
        return find()
    except CannotBuildError as error:
        if setting == "1":
            raise SystemExit(f"{variable}=1, but {error}") from None
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


# The bindings of `_cpu`.
CPU_SOURCES = ["python/cpu.cpp", "python/masks.cpp"]


def modules(toolchain: Toolchain) -> dict[str, list[Unit]]:
    """What the extension modules are made of."""
    import pybind11

    headers = [sysconfig.get_path("include"), pybind11.get_include()]
    python = shlex.join(f"-isystem{path}" for path in headers)
    simt = f"{python} -Icsrc/simt {SIMT_FLAGS}"
    return {
        "_cpu": [*units(toolchain), *(("python", Path(source), python) for source in CPU_SOURCES)],
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
    run_ninja(folder, rules)
    return libraries


def run_ninja(folder: Path, rules: list[str]) -> None:
    """Make what the rules say, where it is older than what it is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("build.ninja").write_text("\n".join([*rules, ""]))
    subprocess.run([sys.executable, "-m", "ninja", "-f", folder / "build.ninja"], check=True)


@dataclass(frozen=True)
class CudaImages:
    """Images of the kernels of csrc/cuda, or what makes them.

    Attributes:
        compiler: version of nvcc.
        architectures: what there are cubins for, 80 for sm_80.
        nvcc: its path; None where the images were made before.
    """

    compiler: str
    architectures: list[int]
    nvcc: Path | None


def cuda_digest() -> str:
    """Tells the images of these sources from those of others."""
    digest = hashlib.sha256(f"{NVCC_FLAGS} {PTX_VERSION}".encode())
    for source in sorted(CUDA_SOURCES.glob("*.cu*")):
        digest.update(f"\n{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def find_cuda() -> CudaImages:
    """nvcc, tried out, or images of these same sources that came along, as in a source archive.

    Raises:
        CannotBuildError: there is neither, or something else that a build needs is missing.
    """
    spec = importlib.util.spec_from_file_location("toolchain", "evsam_kernels/simt/toolchain.py")
    assert spec is not None and spec.loader is not None
    toolchain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolchain)
    try:
        nvcc = toolchain.find("nvcc")[0]
    except toolchain.ToolNotFoundError as error:
        manifest = CUDA_IMAGES / "manifest.json"
        made = json.loads(manifest.read_text()) if manifest.is_file() else {}
        if made.get("digest") == cuda_digest():
            return CudaImages(made["compiler"], made["architectures"], None)
        raise CannotBuildError(str(error)) from None
    if importlib.util.find_spec("ninja") is None:
        raise CannotBuildError("ninja is missing: pip install ninja")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_bf16.h>\n__global__ void probe() {}\n")
        command = [nvcc, *shlex.split(NVCC_FLAGS), probe, "-o", probe.with_suffix(".ptx")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr + result.stdout).strip() or f"it exits with {result.returncode}"
        raise CannotBuildError(f"the CUDA compiler {nvcc} does not work: {said.splitlines()[0]}")
    version, codes = (
        subprocess.run([nvcc, option], capture_output=True, text=True).stdout.split()
        for option in ("--version", "--list-gpu-code")
    )
    release = next(word for word in version if word.startswith("V"))
    archs = [arch for arch in CUBIN_ARCHITECTURES if f"sm_{arch}" in codes]
    return CudaImages(f"nvcc {release[1:]}", archs, nvcc)


def compile_cuda(images: CudaImages, target: Path) -> None:
    """Put the images into the folder `target`, compiling what changed since the last time."""
    folder = Path("build", "cuda")
    sed = f"sed {shlex.quote(f's/^.version .*/.version {PTX_VERSION}/')}"
    rules = [f"builddir = {folder}", f"nvcc = {shlex.quote(str(images.nvcc))}"]
    rules += ["rule ptx", "  depfile = $out.d", "  deps = gcc"]
    rules += [f"  command = $nvcc {NVCC_FLAGS} -MMD -MF $out.d -MT $out $in -o $out.raw && $"]
    rules += [f"    {sed} $out.raw > $out"]
    rules += ["rule cubin", "  command = $nvcc -cubin -arch=sm_$arch $in -o $out"]
    made = []
    for source in sorted(CUDA_SOURCES.glob("*.cu")):
        ptx = folder / f"{source.stem}.ptx"
        rules += [f"build {ptx}: ptx {source}"]
        made.append(ptx)
        for arch in images.architectures:
            made.append(folder / f"{source.stem}.sm_{arch}.cubin")
            rules += [f"build {made[-1]}: cubin {ptx}", f"  arch = {arch}"]
    run_ninja(folder, rules)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in made:
        shutil.copy(path, target)
    manifest = {"digest": cuda_digest(), "compiler": images.compiler}
    manifest["architectures"] = images.architectures
    (target / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


class BuildNative(build_ext):
    """Builds the C++ modules and the CUDA images or leaves them out, and records which."""

    def run(self) -> None:
        decision = decide("EVSAM_BUILD_CPU", find_toolchain)
        images = decide("EVSAM_BUILD_CUDA", find_cuda)
        record = {"version": self.distribution.get_version()}
        record |= self._build_modules(decision) | self._build_images(images)
        path = Path(self.get_ext_fullpath("evsam_kernels.build_info")).parent / "build_info.json"
        path.write_text(json.dumps(record, indent=2) + "\n")

    def _build_modules(self, decision: Toolchain | str) -> dict[str, object]:
        built = isinstance(decision, Toolchain)
        fresh = compile_modules(decision) if built else {}
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            # Unlinked and not overwritten: a process may be running the old one.
            library.unlink(missing_ok=True)
            if built:
                shutil.copy(fresh[extension.name.rpartition(".")[2]], library)
        if not built:
            print(f"evsam-kernels: leaving out the C++ kernels: {decision}", file=sys.stderr)
            return {"cpu_built": False, "cpu_reason": decision}
        return {
            "cpu_built": True,
            "compiler": decision.version,
            "flags": decision.flags,
            "isa_flags": decision.isa_flags,
        }

    def _build_images(self, images: CudaImages | str) -> dict[str, object]:
        target = Path(self.get_ext_fullpath("evsam_kernels.cuda.images")).parent / "images"
        if isinstance(images, str):
            shutil.rmtree(target, ignore_errors=True)
            print(f"evsam-kernels: leaving out the CUDA kernels: {images}", file=sys.stderr)
            return {"cuda_built": False, "cuda_reason": images}
        if images.nvcc is not None:
            compile_cuda(images, target)
        elif target.resolve() != CUDA_IMAGES.resolve():
            shutil.copytree(CUDA_IMAGES, target, dirs_exist_ok=True)
        return {
            "cuda_built": True,
            "cuda_compiler": images.compiler,
            "cuda_architectures": images.architectures,
        }


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("evsam_kernels._cpu", CPU_SOURCES),
            Extension("evsam_kernels._simt", ["python/simt.cpp"]),
        ],
        cmdclass={"build_ext": BuildNative},
    )
