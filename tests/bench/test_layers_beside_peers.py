"""`python -m bench ops`: from its arguments to its tables and files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import command, contest, layers, ops, peaks
from bench.__main__ import main
from bench.layers import Layer
from bench.operation import PARTICIPANTS
from evsam_kernels.numerics.budget import Errors

LAYERS = [
    Layer("layer_norm_2d", "8 4x6", {"channels": 8, "size": [4, 6]}, {"efficientvit-sam-l0": 2}),
    Layer("conv_act", "4->4 9x9", {"channels": [4, 4], "size": [9, 9]}, {"efficientvit-sam-l0": 1}),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Runs the benchmark on two tiny layers and tiny peaks, beside plain PyTorch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layers, "load", lambda: LAYERS)
    monkeypatch.setattr(peaks, "_VALUES", 2**16)
    monkeypatch.setattr(peaks, "_SIDE", {"cpu": 64})
    options = ("ops", "--device", "cpu", "--threads", "1", "--rounds", "1")
    threads = torch.get_num_threads()
    yield lambda *arguments: main([*options, *arguments])
    torch.set_num_threads(threads)


def test_layers_are_timed_shown_and_kept(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    files = ("--json", "new.json", "--csv", "new.csv", "--plot", "new.png")
    assert run("--peers", "eager", "--batch", "2", *files) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("new.json").read_text())
    assert list(result["versions"]) == ["ours", "eager"]
    assert result["settings"]["batch"] == 2
    assert result["peaks"].keys() == {"bytes_per_second", "flops_per_second"}
    names = [layer["name"] for layer in result["layers"]]
    assert names == ["layer_norm_2d 8 4x6", "conv_act 4->4 9x9"]
    for layer in result["layers"]:
        assert list(layer["contestants"]) == ["ours", "eager"]
        for outcome in layer["contestants"].values():
            assert outcome["median_ms"] > 0
            assert outcome["error"] <= layer["allowed_error"]
        assert layer["best_peer"] == "eager"
        assert re.search(rf"^  {re.escape(layer['name'])} .* % ", out, re.MULTILINE)
    with open("new.csv", newline="") as file:
        assert [row["contestant"] for row in csv.DictReader(file)] == ["ours", "eager"] * 2
    assert Path("new.png").read_bytes().startswith(b"\x89PNG")

    assert run("--peers", "", "--layer", "4x6", "--compare", "new.json") == 0
    change = capsys.readouterr().out.split("before ms")[1]
    assert "layer_norm_2d 8 4x6" in change
    assert "settings, batch: 2 before, 1 now" in change
    assert "conv_act" not in change


def test_a_wrong_layer_has_no_times(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "budget", lambda *_: Errors(0.0, 0.0))
    assert run("--peers", "", "--op", "layer_norm_2d", "--json", "new.json") == 1
    (layer,) = json.loads(Path("new.json").read_text())["layers"]
    assert layer["contestants"]["ours"]["median_ms"] is None


def test_layers_that_there_are_none_of(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--layer", "7x7") == 2
    assert "--layer: efficientvit-sam-l0 has no layer with '7x7'" in capsys.readouterr().err


def test_on_a_gpu_every_backend_of_ours_takes_part() -> None:
    assert command.ours("cpu", PARTICIPANTS) == ["ours"]
    assert command.ours("cuda", PARTICIPANTS) == ["ours", "ours, triton", "ours, cuda"]


def test_layers_by_model_operation_and_name() -> None:
    chosen: Any = ops.chosen_layers("efficientvit-sam-xl0", ["conv_act"], "pointwise")
    assert chosen
    assert {layer.op for layer in chosen} == {"conv_act"}
    assert all("pointwise" in layer.name for layer in chosen)
    assert all(list(layer.count) == ["efficientvit-sam-xl0"] for layer in chosen)
