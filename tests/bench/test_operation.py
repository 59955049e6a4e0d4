"""Operations as tasks: what they compute, how much work that is, and who has something for them."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import operation
from bench.contestants import OURS
from bench.layers import Layer, load
from bench.operation import PARTICIPANTS, takes_part, task, work
from evsam_kernels.numerics.budget import call, measure
from evsam_kernels.numerics.cases import CASES
from evsam_kernels.numerics.plain import evaluate
from evsam_kernels.ops.registry import OPERATIONS


def small(op: str) -> Layer:
    """A quick case of an operation, as a layer."""
    case = next(case for case in CASES[op] if case.quick)
    settings = {key: value for key, value in case.settings.items() if key != "batch"}
    return Layer(op, case.name, settings, {"efficientvit-sam-l0": 1})


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_task_is_the_operation_on_operands_at_the_dtype(op: str) -> None:
    layer = small(op)
    made = task(layer, 2, torch.bfloat16, "cpu")
    assert {len(x) for x in made.inputs} == {2}
    with torch.no_grad():
        expected = call(op, layer.operands(torch.bfloat16, 2), "reference")
    found = evaluate(made.module, made.inputs, torch.float32).bfloat16()
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # OpenVINO traces with fixed shapes.
@pytest.mark.parametrize("name", ["ours", "eager", "compile", "onnxruntime", "openvino"])
def test_participants_compute_it(name: str) -> None:
    participant = PARTICIPANTS[name]
    for package in participant.packages:
        pytest.importorskip(package)
    made = task(small("relu_linear_attention"), 1, torch.float32, "cpu")
    oracle = evaluate(made.module, made.inputs, torch.float64)
    with torch.inference_mode():
        for configuration, compute in participant.candidates(made):
            assert measure(compute(), oracle).frobenius < 1e-5, configuration


def test_ours_says_which_backend_auto_has_chosen() -> None:
    made = task(small("layer_norm_2d"), 1, torch.float32, "cpu")
    ((configuration, _),) = PARTICIPANTS[OURS].candidates(made)
    assert configuration in ("cpu", "reference")


def test_work_of_a_convolution() -> None:
    layer = next(layer for layer in load() if layer.name == "512->256 16x16 pointwise")
    flops, moved = work(task(layer, 3, torch.float16, "cpu"))
    assert flops == 2 * 3 * 16 * 16 * 512 * 256
    assert moved == 2 * (3 * 16 * 16 * (512 + 256) + 512 * 256 + 256)


def test_work_of_what_has_several_maps() -> None:
    layer = next(layer for layer in load() if layer.op == "upsample_add")
    maps = sum(height * width for height, width in layer.settings["inputs"])
    flops, moved = work(task(layer, 1, torch.float32, "cpu"))
    assert (flops, moved) == (0, 4 * 256 * (maps + 64 * 64))


def test_who_has_something_for_a_layer() -> None:
    attention, conv = small("relu_linear_attention"), small("conv_act")
    fla = "flash-linear-attention"
    assert takes_part(fla, attention, ())
    assert not takes_part(fla, conv, ())
    assert takes_part("ours", conv, ())
    assert takes_part("eager", conv, ())
    assert takes_part("ours, cuda", conv, ("triton", "cuda"))
    assert not takes_part("ours, cuda", conv, ("triton",))
    assert [name for name in PARTICIPANTS if name.startswith("ours")] == [
        "ours",
        "ours, triton",
        "ours, cuda",
    ]


def test_flash_linear_attention_is_asked_for_its_final_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stood in for by what its documentation says that it computes, as it needs a GPU."""

    def chunk_linear_attn(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        assert (scale, settings) == (1.0, {"output_final_state": True, "normalize": False})
        scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
        return torch.einsum("bhts,bshv->bthv", scores, v), torch.einsum("bthd,bthv->bhdv", k, v)

    stub: Any = types.ModuleType("fla.ops.linear_attn")
    stub.chunk_linear_attn = chunk_linear_attn
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", stub)
    made = task(small("relu_linear_attention"), 2, torch.float32, "cpu")
    oracle = evaluate(made.module, made.inputs, torch.float64)
    ((_, compute),) = operation._fla(made)
    assert measure(compute(), oracle).frobenius < 1e-5


def test_a_copy_of_a_task_has_weights_of_its_own() -> None:
    made = task(small("fused_mbconv"), 1, torch.float32, "cpu")
    copied: Any = copy.deepcopy(made.module)
    copied.spatial_weight.data.zero_()
    assert made.module.get_parameter("spatial_weight").count_nonzero()
