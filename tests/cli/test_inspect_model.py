"""`evsam inspect --model`: the work of layers, the table and the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import evsam_kernels as ek
from evsam_kernels import simt
from evsam_kernels.cli import inspect_model, main
from evsam_kernels.cli.inspect_model import Call, Layer, flops, images_per_second

A100 = simt.GPUS["a100-40gb"]


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def test_flops_are_those_of_the_formulas() -> None:
    x = torch.zeros(2, 8, 6, 6)
    (w,) = weights((16, 8, 3, 3))
    assert flops("conv_act", (x, w), (2, 16, 3, 3)) == 2 * (2 * 9) * 16 * 8 * 9
    # Depthwise: one input channel for each output.
    (w,) = weights((8, 1, 3, 3))
    assert flops("conv_act", (x, w), (2, 8, 6, 6)) == 2 * (2 * 36) * 8 * 9
    spatial, point = weights((32, 8, 3, 3), (16, 32, 1, 1))
    done = flops("fused_mbconv", (x, spatial, None, point), (2, 16, 3, 3))
    assert done == 2 * 18 * (32 * 8 * 9 + 16 * 32)
    expand, depth, point = weights((32, 8, 1, 1), (32, 1, 3, 3), (16, 32, 1, 1))
    done = flops("mbconv", (x, expand, None, depth, None, point), (2, 16, 3, 3))
    assert done == 2 * (72 * 32 * 8 + 18 * (32 * 9 + 16 * 32))
    assert flops("layer_norm_2d", (x, None, None), (2, 8, 6, 6)) == 0
    assert flops("upsample_add", ([x], 12, 12), (2, 8, 12, 12)) == 0


def test_flops_of_attention_are_those_of_its_parts() -> None:
    heads, dim, pixels = 3, 4, 2 * 5 * 5
    x, qkv = torch.zeros(2, 8, 5, 5), torch.zeros(2, heads * 3 * dim, 5, 5)
    # k^T [v, 1], d (d + 1) for each head and pixel, and q times that.
    attention = 2 * pixels * heads * 2 * dim * (dim + 1)
    assert flops("relu_linear_attention", (qkv, dim, 1e-6), (2, 12, 5, 5)) == attention
    qkv_w, depth, group, proj = weights((36, 8, 1, 1), (36, 1, 5, 5), (36, 4, 1, 1), (8, 24, 1, 1))
    operands: tuple[object, ...] = (
        x,
        qkv_w,
        None,
        [depth],
        [],
        [group],
        [],
        proj,
        None,
        None,
        dim,
        1e-6,
    )
    inside = 36 * 8 + 36 * 25 + 36 * 4 + 8 * 24
    found = flops("multi_scale_attention", operands, (2, 8, 5, 5))
    assert found == 2 * pixels * inside + 2 * attention


def call(*operands: object, output: tuple[int, ...]) -> Call:
    return Call("path", "conv_act", operands, output, torch.zeros)


def test_the_ideal_is_the_larger_of_tensor_work_and_bytes() -> None:
    x = torch.zeros(1, 64, 100, 100, dtype=torch.float16)
    w = torch.zeros(64, 64, 3, 3, dtype=torch.float16)
    compute = 2 * 10000 * 64 * 64 * 9 / A100.rates["tensor f16"].per_second
    assert call(x, w, None, None, output=(1, 64, 100, 100)).ideal(A100) == compute
    w = torch.zeros(64, 64, 1, 1, dtype=torch.float16)
    moved = 2 * (2 * x.numel() + w.numel())
    # The residual is the input, and is read once.
    ideal = call(x, w, None, x, output=(1, 64, 100, 100)).ideal(A100)
    assert ideal == pytest.approx(moved / 1555e9)


def test_layers_count_as_often_as_they_are_called() -> None:
    row = inspect_model.LaunchRow("k", (1, 1, 1), 32, 0, 10, 0, 1, 2e-3, "DRAM", 4e-3, (), *[0] * 5)
    layers = [Layer(("a", "b"), "conv_act", "", 1e-3, (row,)), Layer(("c",), "", "", 1e-3, (row,))]
    rates = images_per_second(layers, 12)
    assert rates == pytest.approx({"ideal": 4000, "bound": 2000, "estimate": 1000})


def test_maps_begin_where_a_gpus_would() -> None:
    for shape in ((1, 3, 5, 7), (2, 64, 100, 100), (16, 128, 64, 64)):
        assert inspect_model.zeros(shape, torch.float16).data_ptr() % 512 == 0


class Tiny(nn.Module):
    """An encoder with two layers that are alike, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        conv = ek.nn.ConvLayer
        self.stem = conv(3, 16, kernel_size=3, stride=2)
        self.first = conv(16, 16, kernel_size=3)
        self.second = conv(16, 16, kernel_size=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.stem(x)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")

    def create(name: str, **_: object) -> nn.Module:
        model = nn.Module()
        model.image_encoder = Tiny()
        return model

    monkeypatch.setattr(inspect_model, "create_efficientvit_sam_model", create)


@pytest.mark.usefixtures("tiny")
def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.json"
    arguments = ["inspect", "--model", "efficientvit-sam-l0", "--batch", "2", "--gpu", "a100"]
    assert main([*arguments, "--sample", "2", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "first (x2)" in out
    assert "uncalibrated" in out
    report = json.loads(path.read_text())
    assert (report["model"], report["batch"], report["gpu"]) == (
        *("efficientvit-sam-l0", 2),
        "a100-40gb",
    )
    stem, alike = report["layers"]
    assert stem["paths"] == ["stem"]
    assert alike["paths"] == ["first", "second"]
    for layer in report["layers"]:
        assert 0 < layer["ideal_seconds"] <= layer["bound_seconds"] <= layer["estimate_seconds"]
        (launch,) = layer["launches"]
        assert launch["registers"] > 0
        assert launch["doubtful"] == []
        assert launch["blocks_at_once"] > 0
        # All of the grid, not the sample: a map, at least, is written.
        batch, channels, height, width = map(int, layer["shapes"].split(" -> ")[1].split("x"))
        assert launch["moved"] > 2 * batch * channels * height * width
        assert launch["sectors"] >= launch["ideal_sectors"] >= launch["moved"] / 32
        assert launch["wavefronts"] >= launch["ideal_wavefronts"] > 0
    total = stem["bound_seconds"] + 2 * alike["bound_seconds"]
    assert report["images_per_second"]["bound"] == pytest.approx(2 / total)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either kernels or --model"),
        (["k.cu", "--model", "efficientvit-sam-l0"], "either kernels or --model"),
        (["--model", "efficientvit-sam-l0", "--source"], "take kernels"),
        (["--model", "efficientvit-sam-l0", "--arch", "100"], "no GPU of it is known"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_gpus_that_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--model", "efficientvit-sam-l0", "--gpu", "a1"])
    assert "must be one of a100-40gb" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_gpu_without_published_latencies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", "efficientvit-sam-l0", "--batch", "1", "--gpu", "h100"]) == 2
    assert "no latencies of sm_90" in capsys.readouterr().err
