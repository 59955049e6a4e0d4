"""`python -m bench choice`: layers counted in every way, the table, and the page that shows it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import choice
from bench.__main__ import main
from bench.choice import Found, Way
from evsam_kernels import simt
from evsam_kernels.backends import build_info
from evsam_kernels.cli.inspect_model import Call, LaunchRow
from evsam_kernels.numerics.budget import assert_within_budget
from evsam_kernels.numerics.cases import Case
from evsam_kernels.ops import choice as table
from evsam_kernels.ops import registry

pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
pytest.importorskip("evsam_kernels._simt", reason="the executor was not built")

PAGE = Path(__file__).parents[2] / "docs" / "cuda.md"
CASES = {
    "mbconv": Case(
        "mbconv",
        "tiny",
        {"channels": (16, 64, 16), "size": (6, 8), "activation": "gelu", "residual": True},
    ),
    "multi_scale_attention": Case(
        "multi_scale_attention", "tiny", {"head_dim": 16, "heads": 2, "size": (5, 6)}
    ),
}


def call_of(case: Case) -> Call:
    """A call of the case's operation, as a model would make it."""
    operator = getattr(torch.ops.evsam, case.op).default
    named = case.operands(torch.float16)
    operands = tuple(named[argument.name] for argument in operator._schema.arguments[:-1])
    output = operator(*operands, "reference")
    return Call("block", case.op, operands, tuple(output.shape), operator)


def launch(kernel: str = "k", **figures: Any) -> LaunchRow:
    """A launch of which little is of interest."""
    settings: dict[str, Any] = {
        **{"kernel": kernel, "grid": (1, 1, 1), "block": 32, "shared": 0, "registers": 8},
        **{"spilled": 0, "blocks_at_once": 1, "bound_seconds": 1e-6, "bound_by": "DRAM"},
        **{"estimate_seconds": 2e-6, "doubtful": (), "sectors": 6.0, "ideal_sectors": 4.0},
        **{"wavefronts": 3.0, "ideal_wavefronts": 2.0, "moved": 0.0},
    }
    return LaunchRow(**{**settings, **figures})


@pytest.mark.parametrize("op", CASES)
def test_unfused_is_the_same_computation(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module(f"evsam_kernels.ops.{op}.triton")
    monkeypatch.setattr(kernels, op, lambda *operands: choice.UNFUSED[op](*operands)[0])
    registry.implementation.cache_clear()
    try:
        with simt.emulate():
            assert_within_budget(op, CASES[op].operands(torch.bfloat16), "triton")
    finally:
        registry.implementation.cache_clear()


@pytest.mark.skipif(not build_info.read().cuda_built, reason="the CUDA kernels were not built")
def test_a_layer_is_counted_in_every_way() -> None:
    call = call_of(CASES["mbconv"])
    found = choice.find(call)
    kernels = {name: [row.kernel for row in way.launches] for name, way in found.ways.items()}
    assert kernels["unfused"] == ["conv_kernel", "depthwise_kernel", "conv_kernel"]
    assert kernels["triton"] == ["largest_kernel", *kernels["unfused"]]
    assert any(kernel.startswith("expand_depthwise") for kernel in kernels["cuda"])
    ideal = call.ideal(simt.GPUS["a100-40gb"])
    for way in found.ways.values():
        assert ideal < way.bound <= way.estimate
        assert (way.spilled, way.copied, way.within) == (0, 0, None)
        assert way.wavefronts >= 1 and way.sectors >= 1
    row = found.row
    assert (row.op, row.layer) == ("mbconv", (16, 64, 3, 1, 0))
    assert row.backend == ("cuda" if row.cuda_us <= row.triton_us else "triton")
    assert row.unfused_us == pytest.approx(1e6 * found.ways["unfused"].estimate, abs=0.1)


def test_attention_is_what_lies_between_the_products() -> None:
    call = call_of(CASES["multi_scale_attention"])
    pixels, channels, weights = 2 * 5 * 6, 2 * 3 * 16, 2 * 3 * 16 * (25 + 16)
    least = 2 * (pixels * (channels + 2 * 2 * 16) + weights)
    assert choice.compulsory(call) == least
    launches = [
        *(launch("largest_kernel", moved=1e9), launch("conv_kernel", moved=1e9)),
        # A grouped product is no projection.
        *(launch("attend", moved=least), launch("conv_kernel", moved=least / 4)),
        launch("conv_kernel", moved=1e9),
    ]
    assert choice.within(call, launches, least // 2) == pytest.approx(1.75)
    assert choice.within(call_of(CASES["mbconv"]), launches, 0) is None


def test_ways_add_up() -> None:
    way = Way((launch(), launch(spilled=8, sectors=2.0)), 1555 * 1000, None)
    assert way.bound == pytest.approx(3e-6) and way.estimate == pytest.approx(5e-6)
    assert (way.spilled, way.sectors, way.wavefronts) == (8, 1, 1.5)


def test_the_table_is_printed_and_written(tmp_path, monkeypatch, capsys) -> None:
    faster, slower = Way((launch(),), 0, None), Way((launch(), launch()), 0, None)
    monkeypatch.setattr(choice, "calls", lambda models, batch: [call_of(CASES["mbconv"])])
    monkeypatch.setattr(
        choice,
        "find",
        lambda call: Found(call, {"cuda": slower, "triton": faster, "unfused": slower}),
    )
    monkeypatch.setattr(choice, "FILE", tmp_path / "choice.json")
    assert main(["choice", "--models", "efficientvit-sam-l0", "--batch", "2"]) == 0
    head, _, cuda, triton, unfused = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == list(choice.HEADINGS)
    assert cuda.startswith("| 16 -> 64 -> 16, 6x8 | cuda |") and "| 2.0 | 4.0 |" in cuda
    assert "| **triton** |" in triton and "| 1.500 | 1.500 |" in triton and "unfused" in unfused
    monkeypatch.setattr(table, "_TABLE", tmp_path / "choice.json")
    table.rows.cache_clear()
    (row,) = table.rows()
    table.rows.cache_clear()
    assert row == ("mbconv", (16, 64, 3, 1, 0), "triton", 4.0, 2.0, 4.0)


def test_models_that_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["choice", "--models", "efficientvit-sam-l9"]) == 2
    assert "got 'efficientvit-sam-l9'" in capsys.readouterr().err


def test_the_page_shows_the_committed_table() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines()]
    rows = [[cell.strip(" *") for cell in row] for row in rows if len(row) == len(choice.HEADINGS)]
    estimates = {
        name: [float(row[4]) for row in rows if row[1] == name]
        for name in (*choice.BACKENDS, "unfused")
    }
    shown = sorted(zip(*estimates.values(), strict=True))
    assert shown == sorted((row.cuda_us, row.triton_us, row.unfused_us) for row in table.rows())
