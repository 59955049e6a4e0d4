"""The executor under sanitizers, on PTX that was broken at random."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
SANITIZERS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -pthread"
ROUNDS = 2000


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built with sanitizers from what setup.py compiles."""
    spec = importlib.util.spec_from_file_location("evsam_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup: Any = importlib.util.module_from_spec(spec)
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setitem(sys.modules, "evsam_setup", setup)
        spec.loader.exec_module(setup)
        try:
            toolchain = setup.find_toolchain()
        except setup.CannotBuildError as error:
            pytest.skip(f"C++ cannot be compiled here: {error}")
        units = setup.simt_units()

    def compile_unit(variant: str, source: Path, flags: str) -> Path:
        output = folder / f"{variant}.{source.stem}.o"
        arguments = f"{toolchain.cxx} {toolchain.flags} {SANITIZERS} {flags}"
        command = [*shlex.split(arguments), "-c", str(source), "-o", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return output

    own = ("tests", HERE / "fuzz.cpp", units[0][2])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: compile_unit(*unit), [*units, own]))
    program = folder / "fuzz"
    command = [
        *shlex.split(f"{toolchain.cxx} {SANITIZERS}"),
        *map(str, objects),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize("file", sorted(HERE.glob("*.ptx")), ids=lambda path: path.stem)
def test_broken_text_never_breaks_the_executor(fuzz: Path, file: Path) -> None:
    # Leaks are not looked for: that needs ptrace, which containers often forbid.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [fuzz, str(ROUNDS), file], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.match(r"(\d+) refused, (\d+) launched, (\d+) with faults", done.stdout)
    assert found is not None
    refused, launched, faulty = map(int, found.groups())
    assert refused > ROUNDS // 20
    assert launched > ROUNDS // 20
    assert faulty > 0
