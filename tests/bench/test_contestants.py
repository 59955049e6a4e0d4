"""The contestants: each computes what it is given, in every configuration, or says why not."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.blocks import NeckInputs
from bench.contestants import CONTESTANTS, OURS, PEERS, Contestant, Task
from bench.plain import evaluate
from evsam_kernels.nn import EfficientViTBlock, SamNeck
from evsam_kernels.numerics.budget import measure
from evsam_kernels.sam.synthetic import load_synthetic_weights

ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Well above what rounding gives these blocks, well below what a wrong layout or GELU gives."""


@pytest.fixture(params=["block", "neck"])
def module_and_inputs(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A block with GELU and attention, and one with several inputs; height and width differ."""
    torch.manual_seed(0)
    if request.param == "block":
        module: nn.Module = EfficientViTBlock(32, dim=16, expand_ratio=2, act_func="gelu").eval()
        inputs: tuple[Tensor, ...] = (torch.randn(1, 32, 6, 8),)
    else:
        module = NeckInputs(SamNeck(["a", "b"], [8, 4], 8, 0, 1, "fmb"))
        inputs = (torch.randn(1, 8, 4, 6), torch.randn(1, 4, 8, 5))
    load_synthetic_weights(module)
    return module, inputs


def skip_unless_it_can_run(name: str) -> None:
    for package in CONTESTANTS[name].packages:
        pytest.importorskip(package, reason=f"{name} is an optional peer: pip install {package}")
    if name == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler: install g++")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # OpenVINO traces with fixed shapes.
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_configuration_computes_the_module(
    name: str, dtype: torch.dtype, module_and_inputs: tuple[nn.Module, tuple[Tensor, ...]]
) -> None:
    skip_unless_it_can_run(name)
    contestant = CONTESTANTS[name]
    if dtype not in contestant.dtypes:
        assert contestant.refusal(dtype, "native") == "does not run bfloat16"
        return
    module, inputs = module_and_inputs
    oracle = evaluate(module, inputs, torch.float64)
    names = []
    with torch.inference_mode():
        for configuration, run in contestant.candidates(Task(module, inputs, dtype)):
            names.append(configuration)
            for _ in range(2):
                output = run()
                assert output.shape == oracle.shape
                assert measure(output, oracle).frobenius < ERROR[dtype], configuration
    assert names
    assert len(set(names)) == len(names)


def test_ours_says_what_runs_it() -> None:
    module = EfficientViTBlock(32, dim=16, expand_ratio=2, act_func="gelu").eval()
    task = Task(module, (torch.randn(1, 32, 6, 8),), torch.float32)
    ((configuration, _),) = CONTESTANTS[OURS].candidates(task)
    assert configuration.startswith("2 on ")


def test_ours_is_no_peer() -> None:
    assert PEERS == ("eager", "compile", "onnxruntime", "openvino")


def nothing(task: Task) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("dtype", "isa", "refusal"),
    [
        (torch.float32, "native", ""),
        (torch.bfloat16, "native", "does not run bfloat16"),
        (torch.float32, "avx2", "cannot be kept to avx2"),
    ],
)
def test_refusals(dtype: torch.dtype, isa: str, refusal: str) -> None:
    contestant = Contestant(nothing, ("torch",), dtypes=(torch.float32,), obeys_isa=False)
    assert contestant.refusal(dtype, isa) == refusal


def test_missing_packages_are_named() -> None:
    assert Contestant(nothing, ("torch", "no_such_package")).missing == ["no_such_package"]
    assert Contestant(nothing, ("torch",)).missing == []
    assert Contestant(nothing, ("torch",)).version == torch.__version__
