"""`evsam inspect`: its table, its files, its exit status and its complaints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import simt_kernels

from evsam_kernels.cli import main
from evsam_kernels.simt import toolchain

TRANSPOSE = """
extern "C" __global__ void transpose(const float* x, float* y) {
    __shared__ float tile[32][32];
    tile[threadIdx.y][threadIdx.x] = x[threadIdx.y * 32 + threadIdx.x];
    BARRIER
    y[threadIdx.y * 32 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}
"""
LAUNCH = "transpose.cu:transpose<<<1, (32, 32)>>>(x=f32[32, 32], y=empty(f32[32, 32]))"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "transpose.cu").write_text(TRANSPOSE.replace("BARRIER", "__syncthreads();"))
    (tmp_path / "broken.cu").write_text(TRANSPOSE.replace("BARRIER", ""))
    for kernel in simt_kernels.FOLDER.iterdir():
        if kernel.is_file():
            shutil.copy(kernel, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the table's rows, by their first."""
    lines = [line.strip("│┃ ") for line in output.splitlines() if line.startswith(("│", "┃"))]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    return {row[0]: row[1:] for row in cells if len(row) > 1}


def test_a_kernel_that_is_not_launched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "transpose.cu", "gemm.cu"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["transpose"][1:3] == ["0", "4096"]
    assert table["transpose"][3:] == ["-", "-", "-", "-", "-", "-"]
    assert int(table["gemm"][0]) > 32


def test_a_launch_is_checked_counted_and_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", LAUNCH]) == 0
    out = capsys.readouterr().out
    registers, spilled, shared, occupancy, sectors, wavefronts, faults, bound, by = rows(out)[
        "transpose"
    ]
    assert int(registers) > 0
    assert (spilled, shared, occupancy) == ("0", "4096", "100%, threads")
    # Reading columns of 32 floats meets 32-fold conflicts.
    assert (sectors, wavefronts) == ("256 / 256", f"{32 + 32 * 32} / 64")
    assert faults == "0"
    assert float(bound) > 0
    assert by == "shared memory"
    assert "NVIDIA A100 SXM 40 GB: at least" in out


def test_a_fault_is_printed_and_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", LAUNCH.replace("transpose.cu", "broken.cu")]) == 1
    out = capsys.readouterr().out
    assert int(rows(out)["transpose"][6]) > 0
    assert "race" in out
    assert "broken.cu:6" in out


def test_a_triton_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    kernel = (
        "triton_kernels.py:softmax[3](f16[3, 200], empty(f16[3, 200]), 200, COLUMNS=256, "
        "num_warps=2)"
    )
    assert main(["inspect", kernel, "--gpu", "a100-80gb"]) == 0
    out = capsys.readouterr().out
    assert rows(out)["softmax"][6] == "0"
    assert "NVIDIA A100 SXM 80 GB: at least" in out


def test_the_source_is_annotated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", LAUNCH, "--source"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (store,) = (line for line in lines if "    tile[threadIdx.y][threadIdx.x] = x[" in line)
    warps, *rest = store.split("|")[0].split()
    assert int(warps) >= 64
    assert rest == ["128", "/", "128", "32", "/", "32", "4"]
    (load,) = (line for line in lines if "    y[threadIdx.y * 32" in line)
    assert load.split("|")[0].split()[-4:] == ["1024", "/", "32", "6"]


def test_json_has_everything(folder: Path) -> None:
    assert main(["inspect", LAUNCH, "gemm.cu", "--json", "report.json"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["arch"] == 80
    launched, not_launched = report["kernels"]
    assert launched["kernel"] == "transpose"
    assert launched["asked"] == LAUNCH
    assert launched["resources"]["opcodes"]["STS"] == 1
    assert launched["occupancy"]["blocks"] == 2
    assert launched["launch"]["grid"] == [1, 1, 1]
    assert launched["launch"]["faults"] == []
    assert launched["launch"]["unique_bytes"]["x"] == {"read": 4096, "written": 0}
    assert launched["launch"]["unique_bytes"]["y"] == {"read": 0, "written": 4096}
    assert {line["line"] for line in launched["launch"]["by_line"]} >= {4, 5, 6}
    bound = launched["bound"]
    assert bound["gpu"] == "a100-40gb"
    assert bound["seconds_at_least"] == max(term["seconds_at_least"] for term in bound["terms"])
    assert all("https://" in term["source"] for term in bound["terms"])
    assert not_launched["launch"] is not_launched["bound"] is None


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots(suffix: str, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    path = folder / f"bounds.{suffix}"
    assert main(["inspect", LAUNCH, "--plot", str(path)]) == 0
    start = path.read_bytes()[:400]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in start


def test_another_architecture_without_a_known_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", LAUNCH, "--arch", "86"]) == 0
    out = capsys.readouterr().out
    assert "Kernels on sm_86" in out
    assert "bound by shared memory" not in out
    assert rows(out)["transpose"][7:] == ["-", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.cu"], "none.cu: there is no file none.cu"),
        (["transpose.cu:transpose<<<1>>>()"], "between <<< and >>> must be grid, block"),
        (["transpose.cu", "--json", "no/report.json"], "there is no folder no; make it first"),
        (["transpose.cu", "--plot", "bounds.txt"], "--plot must end in .png, .pdf, .svg"),
        (
            ["transpose.cu", "--plot", "bounds.png"],
            "--plot draws the bounds of launches, and no KERNEL",
        ),
    ],
)
def test_what_cannot_be_done_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evsam inspect: error: ")
    assert message in error


def test_what_the_compiler_says_is_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "wrong.cu").write_text("__global__ void wrong() { nonsense; }")
    assert main(["inspect", "wrong.cu"]) == 2
    assert '"nonsense" is undefined' in capsys.readouterr().err
    monkeypatch.setattr(toolchain, "_candidates", lambda tool: iter(()))
    assert main(["inspect", "transpose.cu"]) == 2
    assert "nvcc is not installed" in capsys.readouterr().err
