"""Which backend "auto" takes for a layer on a GPU: the table, and who asks it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import evsam_kernels as ek
from evsam_kernels import backends, simt
from evsam_kernels.backends import Backend
from evsam_kernels.nn.folded import FoldedBlock
from evsam_kernels.ops import choice, registry
from evsam_kernels.ops.choice import Layer, Row
from evsam_kernels.sam.zoo import create_efficientvit_sam_model

ROWS = choice.rows()


def test_the_table_names_operations_with_both_kernels_and_no_layer_twice() -> None:
    assert json.loads(choice._TABLE.read_text())["made_with"].startswith("python -m bench choice")
    assert len({(row.op, row.layer) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert registry.has_kernel(row.op, "cuda") and registry.has_kernel(row.op, "triton")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}-{'-'.join(map(str, row.layer))}")
def test_the_table_has_what_is_faster(row: Row) -> None:
    estimates = {"cuda": row.cuda_us, "triton": row.triton_us}
    assert row.backend == min(estimates, key=estimates.__getitem__)
    assert estimates[row.backend] <= row.unfused_us


def operands_of(row: Row) -> dict[str, Any]:
    """Of a call on a small map."""
    channels, inside, kernel, stride, head_dim = row.layer

    def weight(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float16)

    x = weight(1, channels, 2, 2)
    if row.op == "mbconv":
        return {
            "x": x,
            "expand_weight": weight(inside, channels, 1, 1),
            "expand_bias": None,
            "depth_weight": weight(inside, 1, kernel, kernel),
            "depth_bias": None,
            "point_weight": weight(8, inside, 1, 1),
            "stride": stride,
        }
    return {
        "x": x,
        "qkv_weight": weight(inside, channels, 1, 1),
        "qkv_bias": None,
        "depth_weights": [weight(inside, 1, kernel, kernel)],
        "depth_biases": [],
        "group_weights": [weight(inside, head_dim, 1, 1)],
        "group_biases": [],
        "proj_weight": weight(8, inside // 3 * 2, 1, 1),
        "head_dim": head_dim,
    }


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch):
    """The backends whose kernels are called, in place of which nothing runs."""
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    names: list[str] = []
    has = {op: {name for name in ("triton", "cuda") if registry.has_kernel(op, name)} for op in OPS}

    def kernel_file(op: str, backend: str) -> Any:
        def kernel(x: torch.Tensor, *_: Any) -> torch.Tensor:
            names.append(backend)
            return x

        return SimpleNamespace(DTYPES=(torch.float16,), **{op: kernel})

    monkeypatch.setattr(registry, "_kernel_file", kernel_file)
    monkeypatch.setattr(registry, "has_kernel", lambda op, name, _=None: name in has[op])
    for name in ("triton", "cuda"):
        there = Backend(name, "a GPU", ("cuda",), lambda: None, emulated=True)
        monkeypatch.setitem(backends.BACKENDS, name, there)
    registry.implementation.cache_clear()
    yield names
    registry.implementation.cache_clear()


OPS = ("mbconv", "multi_scale_attention")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}-{'-'.join(map(str, row.layer))}")
def test_auto_runs_what_the_table_says(row: Row, taken: list[str]) -> None:
    with simt.emulate(auto=True):
        getattr(ek.ops, row.op)(**operands_of(row))
    assert taken == [row.backend]


def folded_layers(name: str) -> set[tuple[str, Layer]]:
    """What the fused encoder of a model asks the table for."""
    with torch.device("meta"):
        model = create_efficientvit_sam_model(name, pretrained=False).eval()
    encoder: nn.Module = ek.fuse(model.image_encoder, backend="reference", dtype=torch.float16)
    blocks = [module for module in encoder.modules() if isinstance(module, FoldedBlock)]
    return {(block.operation, block.layer) for block in blocks if block.layer is not None}


def test_the_table_has_every_layer_of_the_models() -> None:
    wanted = folded_layers("efficientvit-sam-l0") | folded_layers("efficientvit-sam-xl0")
    assert wanted == {(row.op, row.layer) for row in ROWS}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """CUDA for a layer of stride 2, Triton for a wider one and for one of stride 1."""
    rows = [
        ((32, 128, 3, 2, 0), "cuda"),
        ((64, 256, 3, 2, 0), "triton"),
        ((32, 128, 3, 1, 0), "triton"),
        ((32, 128, 5, 1, 0), "cuda"),
    ]
    figures = {"cuda_us": 1.0, "triton_us": 1.0, "unfused_us": 1.0}
    entries = [
        {"op": "mbconv", "layer": Layer(*layer)._asdict(), "backend": backend, **figures}
        for layer, backend in rows
    ]
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({"layers": entries}))
    monkeypatch.setattr(choice, "_TABLE", path)
    choice.rows.cache_clear()
    for name in ("triton", "cuda"):
        there = Backend(name, "a GPU", ("cuda",), lambda: None)
        monkeypatch.setitem(backends.BACKENDS, name, there)
    yield
    choice.rows.cache_clear()


@pytest.mark.parametrize(
    ("op", "layer", "expected"),
    [
        ("mbconv", Layer(32, 128, 3, 2, 0), "cuda"),
        ("mbconv", Layer(64, 256, 3, 2, 0), "triton"),
        ("mbconv", Layer(32, 128, 3, 1, 0), "triton"),
        # Those that are not there are taken for the nearest of the same kernel and stride.
        ("mbconv", Layer(40, 160, 3, 2, 0), "cuda"),
        ("mbconv", Layer(1000, 4000, 3, 2, 0), "triton"),
        ("mbconv", Layer(64, 256, 5, 1, 0), "cuda"),
        ("mbconv", Layer(32, 128, 5, 2, 0), "triton"),
        ("mbconv", Layer(32, 128, 3, 2, 32), "triton"),
        ("mbconv", None, "triton"),
        ("multi_scale_attention", Layer(32, 128, 3, 1, 0), "triton"),
    ],
)
def test_auto_goes_by_the_table(op: str, layer: Layer | None, expected: str, table) -> None:
    assert registry.chosen_backend(op, "auto", "cuda", torch.float16, layer) == expected


def test_the_table_says_nothing_of_backends_that_are_not_there(table, monkeypatch) -> None:
    missing = Backend("cuda", "a GPU", ("cuda",), lambda: "not built")
    monkeypatch.setitem(backends.BACKENDS, "cuda", missing)
    layer = Layer(32, 128, 3, 2, 0)
    assert registry.chosen_backend("mbconv", "auto", "cuda", torch.float16, layer) == "triton"
    monkeypatch.setitem(
        backends.BACKENDS, "triton", Backend("triton", "", ("cuda",), lambda: "none")
    )
    assert registry.chosen_backend("mbconv", "auto", "cuda", torch.float16, layer) == "reference"


def test_layers_are_told_by_weights() -> None:
    weights = [torch.zeros(96, 1, size, size) for size in (3, 5)]
    qkv = torch.zeros(96, 24, 1, 1)
    assert Layer.of_attention(qkv, weights, 8) == Layer(24, 96, 5, 1, 8)
    assert Layer.of_attention(qkv, [], 16) == Layer(24, 96, 1, 1, 16)
    assert Layer.of_mbconv(qkv, weights[0], 2) == Layer(24, 96, 3, 2, 0)
    assert choice.layer_of("conv_act", {"x": qkv}) is None


def test_auto_leaves_heads_that_the_table_does_not_know_to_triton(taken: list[str]) -> None:
    row = next(row for row in ROWS if row.op == "multi_scale_attention")
    wide = row._replace(layer=row.layer._replace(head_dim=128))
    with simt.emulate(auto=True):
        ek.ops.multi_scale_attention(**operands_of(wide))
    assert taken == ["triton"]
