"""The C++ kernels on their own: under sanitizers, and what their object files define."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SANITIZERS = "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
OPERATIONS = sorted(path.stem for path in HERE.glob("*.cpp") if path.stem != "storage")

Unit = tuple[str, Path, str]
"""Name of the variant, source and flags."""

Object = tuple[str, Path, Path]
"""Name of the variant, source and what it was compiled to."""


@dataclass(frozen=True)
class Build:
    """What setup.py compiles, and how; of it, what this machine can run."""

    cxx: str
    isa_flags: dict[str, str]
    units: list[Unit]
    runnable: list[Unit]
    folder: Path

    def run(self, arguments: str) -> None:
        """Run the compiler in the checkout's root."""
        command = shlex.split(f"{self.cxx} {arguments}")
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def compile_units(self, units: list[Unit], flags: str) -> list[Object]:
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        outputs = [folder / f"{variant}.{source.stem}.o" for variant, source, _ in units]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for job in [
                pool.submit(self.run, f"{flags} {own} -c {source} -o {output}")
                for (_, source, own), output in zip(units, outputs, strict=True)
            ]:
                job.result()
        return [
            (variant, source, output)
            for (variant, source, _), output in zip(units, outputs, strict=True)
        ]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    spec = importlib.util.spec_from_file_location("evsam_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup: Any = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setitem(sys.modules, "evsam_setup", setup)
        spec.loader.exec_module(setup)
        try:
            toolchain = setup.find_toolchain()
        except setup.CannotBuildError as error:
            pytest.skip(f"C++ cannot be compiled here: {error}")
        here = pytest.importorskip("evsam_kernels._cpu", reason="was not built")
        runs = {isa: toolchain.isa_flags[isa] for isa in here.available_isas()}
        yield Build(
            f"{toolchain.cxx} {toolchain.flags}",
            runs,
            setup.units(toolchain),
            setup.units(replace(toolchain, isa_flags=runs)),
            tmp_path_factory.mktemp("build"),
        )


@pytest.fixture(scope="module")
def compiled(build: Build) -> list[Object]:
    """All kernels that run here, built with sanitizers."""
    return build.compile_units(build.runnable, SANITIZERS)


@pytest.fixture(scope="module")
def sanitized(compiled: list[Object]) -> list[Path]:
    return [output for _, _, output in compiled]


def run_sanitized(program: Path) -> str:
    # Leaks are not looked for: that needs ptrace, which containers often forbid.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_operation_has_a_program() -> None:
    assert {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_under_sanitizers(build: Build, sanitized: list[Path], operation: str) -> None:
    program = build.folder / operation
    objects = " ".join(map(str, sanitized))
    build.run(f"{SANITIZERS} {HERE / operation}.cpp {objects} -o {program}")
    assert run_sanitized(program).startswith("portable\n")


def test_conversions(build: Build, sanitized: list[Path]) -> None:
    names = build.folder / "names"
    source = names.with_suffix(".cpp")
    source.write_text(
        '#include <cstdio>\n#include "evsam/isa.h"\n'
        "int main() { for (auto& name : evsam::available_isas()) std::puts(name.c_str()); }\n"
    )
    build.run(f"{SANITIZERS} {source} {' '.join(map(str, sanitized))} -o {names}")
    for isa in run_sanitized(names).split():
        program = build.folder / f"storage.{isa}"
        flags = f"{SANITIZERS} -DEVSAM_ISA={isa} {build.isa_flags[isa]}"
        build.run(f"{flags} {HERE / 'storage.cpp'} -o {program}")
        run_sanitized(program)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) lists the symbols")
def test_code_for_one_instruction_set_cannot_replace_that_of_another(
    build: Build, compiled: list[Object]
) -> None:
    """A kernel's object defines its operation, its packing and nothing a linker could merge."""
    # Unoptimised, every inline function and template that is used is also emitted, with sanitizers
    # as without.
    others = [unit for unit in build.units if unit[:2] not in [each[:2] for each in compiled]]
    for variant, source, output in [*compiled, *build.compile_units(others, "-O0")]:
        if variant == "baseline":
            continue
        listing = subprocess.run(
            ["nm", "--defined-only", "--extern-only", "--demangle", output],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        symbols = re.findall(r"^\w* \w (.*)$", listing, re.MULTILINE)
        # What compilers add themselves to end the program when an exception would leave a thread.
        functions = [
            name for name in symbols if not name.startswith(("DW.ref.", "__clang_call_terminate"))
        ]
        names = {name.split("(")[0] for name in functions}
        own = f"evsam::{variant}::{source.stem}"
        assert own in names, (source, functions)
        assert names <= {own, f"{own}_pack"}, (source, functions)
