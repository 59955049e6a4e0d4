"""The contestants: each computes what it is given, in every configuration, or says why not."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import command, contestants
from bench.blocks import NeckInputs
from bench.contestants import AUTOTUNED, CONTESTANTS, OURS, PEERS, Contestant, Task, and_as_graph
from evsam_kernels.nn import EfficientViTBlock, SamNeck
from evsam_kernels.numerics.budget import measure
from evsam_kernels.numerics.plain import evaluate
from evsam_kernels.ops import tiling
from evsam_kernels.sam.synthetic import load_synthetic_weights

ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Well above what rounding gives these blocks, well below what a wrong layout or GELU gives."""


@pytest.fixture(autouse=True)
def no_autotuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contestant that asks for it does so in a process of its own, which ends."""
    monkeypatch.setenv(tiling.VARIABLE, "0")


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
@pytest.mark.parametrize(
    "name", [name for name, who in CONTESTANTS.items() if "cpu" in who.devices]
)
def test_every_configuration_computes_the_module(
    name: str, dtype: torch.dtype, module_and_inputs: tuple[nn.Module, tuple[Tensor, ...]]
) -> None:
    skip_unless_it_can_run(name)
    contestant = CONTESTANTS[name]
    if dtype not in contestant.dtypes:
        assert contestant.refusal(dtype) == "does not run bfloat16"
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


def test_ours_with_timed_tiles_asks_for_them() -> None:
    task = Task(EfficientViTBlock(32, dim=16).eval(), (torch.randn(1, 32, 6, 8),), torch.float32)
    assert list(CONTESTANTS[AUTOTUNED].candidates(task))
    assert tiling.enabled()


def test_ours_is_no_peer() -> None:
    assert command.ours("cpu") == [OURS]
    assert command.ours("cuda") == [OURS, AUTOTUNED]
    assert PEERS == ("eager", "compile", "onnxruntime", "openvino", "tensorrt")


def nothing(task: Task) -> Any:
    raise NotImplementedError


def test_a_device_that_it_does_not_run_on() -> None:
    contestant = Contestant(nothing, ("torch",), devices=("cuda",))
    assert contestant.refusal(torch.float32) == "does not run on cpu here"
    assert contestant.refusal(torch.float32, device="cuda") == ""


class Graph:
    """Stands in for a CUDA graph: what was captured is computed again by a replay."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


def test_on_a_gpu_launches_are_captured_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[str] = []
    calls: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            streams.append("wait")

    @contextmanager
    def during(name: str) -> Iterator[None]:
        streams.append(name)
        yield
        streams.append(f"end of {name}")

    def compute() -> Tensor:
        calls.append(streams[-1])
        return torch.tensor(3.0)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: during("aside"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: during("capture"))
    task = Task(torch.nn.Identity(), (), torch.float16, "cuda")
    (plain, _), (captured, replay) = and_as_graph(task, "as it is", compute)
    assert (plain, captured) == ("as it is", "as it is, CUDA graph")
    assert calls == ["aside", "capture"]
    assert replay() == 3
    assert (len(calls), Graph.replays) == (2, 1)


def test_tensorrt_gets_the_plain_module(
    monkeypatch: pytest.MonkeyPatch, module_and_inputs: tuple[nn.Module, tuple[Tensor, ...]]
) -> None:
    """Stood in for by what its documentation says that it is called with, as it needs a GPU."""

    def compiled(module: nn.Module, **settings: Any) -> nn.Module:
        inputs = settings.pop("inputs")
        assert settings == {"ir": "dynamo", "use_explicit_typing": True, "min_block_size": 1}
        assert all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in inputs)
        assert next(module.parameters()).dtype == torch.bfloat16
        return module

    stub: Any = types.ModuleType("torch_tensorrt")
    stub.compile = compiled
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stub)
    module, inputs = module_and_inputs
    oracle = evaluate(module, inputs, torch.float64)
    with torch.inference_mode():
        ((_, run),) = contestants._tensorrt(Task(module, inputs, torch.bfloat16))
        assert measure(run(), oracle).frobenius < ERROR[torch.bfloat16]


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
    called = Contestant(nothing, ("no_such_package",), distribution="no-such-distribution")
    assert called.missing == ["no-such-distribution"]
    assert Contestant(nothing, ("torch",)).version == torch.__version__
