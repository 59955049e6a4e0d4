"""`evsam info`, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import evsam_kernels
from evsam_kernels import backends
from evsam_kernels.backends import BACKENDS, Backend, build_info
from evsam_kernels.cli import info, main
from evsam_kernels.ops import tiling
from evsam_kernels.ops.registry import OPERATIONS
from evsam_kernels.simt import toolchain


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_json_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    facts = printed(capsys)
    assert list(facts) == [
        *("package", "build", "cpu_kernels", "machine", "cuda", "backends", "operations"),
        *("tiles", "gpu_tools", "optional_packages"),
    ]
    assert facts["package"]["version"] == evsam_kernels.__version__
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    fields = {field.name for field in dataclasses.fields(build_info.BuildInfo)}
    assert set(facts["build"]) == fields
    assert facts["cuda"]["available"] == torch.cuda.is_available()
    assert bool(facts["cuda"]["reason"]) != facts["cuda"]["available"]


def test_tiles_say_whether_they_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EVSAM_AUTOTUNE", raising=False)
    assert main(["info"]) == 0
    assert "from a table; EVSAM_AUTOTUNE=1 has GPUs time them" in capsys.readouterr().out
    monkeypatch.setenv("EVSAM_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A100")
    tiles = printed(capsys)["tiles"]
    assert tiles["autotune"] is True
    assert tiles["files"] == [str(tiling.cache_file("A100"))]
    assert main(["info"]) == 0
    assert f"kept in {tiles['files'][0]}" in capsys.readouterr().out


def test_json_lists_backends_and_operations(capsys: pytest.CaptureFixture[str]) -> None:
    facts = printed(capsys)
    assert [backend["name"] for backend in facts["backends"]] == list(BACKENDS)
    reference = facts["backends"][0]
    assert reference["available"] is True
    assert reference["reason"] is None
    assert [op["name"] for op in facts["operations"]] == list(OPERATIONS)
    for op in facts["operations"]:
        assert "reference" in op["kernels"]
        assert op["auto"]["cpu"] in op["kernels"]


def test_programs_for_gpu_kernels_are_found_or_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(tool: str) -> list[Path]:
        if tool == "nvcc":
            raise toolchain.ToolNotFoundError("nvcc is not installed: install it")
        return [Path("/first") / tool, Path("/second") / tool]

    monkeypatch.setattr(toolchain, "find", find)
    tools = {tool["name"]: tool for tool in printed(capsys)["gpu_tools"]}
    assert tools["nvcc"]["path"] is None
    assert tools["ptxas"]["path"] == "/first/ptxas"
    main(["info"])
    said = capsys.readouterr().out
    assert "nvcc       nvcc is not installed: install it (compiles CUDA kernels)\n" in said
    assert "/first/nvdisasm" in said


def test_a_build_is_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build_info.BuildInfo(
        cpu_built=True, compiler="cc 1.0", flags="-O3", isa_flags={"portable": "", "fast": "-mfast"}
    )
    kernels = types.SimpleNamespace(isa=lambda: "fast", available_isas=lambda: ["portable", "fast"])
    monkeypatch.setattr(build_info, "read", lambda: built)
    monkeypatch.setitem(sys.modules, "evsam_kernels._cpu", kernels)
    facts = printed(capsys)
    assert facts["build"] == dataclasses.asdict(built)
    assert facts["cpu_kernels"] == {"isa": "fast", "available_isas": ["portable", "fast"]}
    main(["info"])
    lines = [line.split("  ", 2)[-1].strip() for line in capsys.readouterr().out.splitlines()]
    assert {"built for portable, fast", "cc 1.0", "-O3"} <= set(lines)
    assert "fast in use; this processor runs portable, fast" in lines


def test_a_missing_build_is_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_info, "read", lambda: build_info.BuildInfo(False, "no compiler"))
    monkeypatch.setitem(sys.modules, "evsam_kernels._cpu", None)
    assert printed(capsys)["cpu_kernels"] is None
    main(["info"])
    out = capsys.readouterr().out
    assert "C++ kernels   not built: no compiler\n" in out
    assert "CUDA kernels  not built: " in out


def test_a_backend_that_cannot_run_is_shown_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    abacus = Backend("abacus", "beads", ("cpu",), lambda: "no beads; buy some")
    monkeypatch.setitem(backends.BACKENDS, "abacus", abacus)
    shown = printed(capsys)["backends"][-1]
    assert shown == {
        "name": "abacus",
        "executes": "beads",
        "devices": ["cpu"],
        "available": False,
        "reason": "no beads; buy some",
    }
    main(["info"])
    assert "abacus     beads: no beads; buy some" in capsys.readouterr().out


def test_optional_packages_have_a_version_or_a_way_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {
        optional["name"]: optional["version"] for optional in info.gather()["optional_packages"]
    }
    assert set(versions) == {"triton", "pycocotools", "scipy", "matplotlib", "safetensors"}
    assert versions["pycocotools"]
    monkeypatch.setattr(info, "_version", lambda name: None if name == "scipy" else "1.2.3")
    main(["info"])
    out = capsys.readouterr().out
    assert "scipy        not installed: pip install scipy" in out
    assert "pycocotools  1.2.3" in out


def test_text_says_what_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    facts = printed(capsys)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert facts["machine"]["processor"] in out
    assert facts["package"]["folder"] in out
    for op in facts["operations"]:
        assert f"{op['name']} " in out
        assert f"auto picks {op['auto']['cpu']} on cpu" in out
    for heading in ("build", "backends", "operations", "optional packages"):
        assert f"\n{heading}\n" in out


def test_a_gpu_is_named_and_auto_is_shown_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    properties = types.SimpleNamespace(name="GPU 0", major=8, minor=0, total_memory=40 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    facts = info.gather()
    assert facts["machine"]["gpu"] == "GPU 0 (compute capability 8.0, 40 GiB, CUDA 13.0)"
    assert facts["cuda"] == {"available": True, "reason": None, "devices": ["GPU 0"]}
    assert facts["operations"][0]["auto"]["cuda"] in facts["operations"][0]["kernels"]


def test_a_pytorch_that_finds_no_gpu_is_told_from_one_without_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU alone" in info.gather()["cuda"]["reason"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no GPU" in info.gather()["cuda"]["reason"]
