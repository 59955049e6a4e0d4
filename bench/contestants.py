"""Who takes part: our fused module, and each peer in every configuration that may be its best.

A contestant turns a task into candidates: functions that compute the output once. Its worker times
the candidates for a moment and keeps the fastest.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import evsam_kernels
from evsam_kernels.backends import BACKENDS
from evsam_kernels.numerics.plain import plain, plain_channels_last
from evsam_kernels.ops import tiling

OURS = "ours"
AUTOTUNED = f"{OURS}, autotuned"


def is_ours(name: str) -> bool:
    """Whether a contestant is no peer: `OURS`, or that in a particular way, as "ours, cuda"."""
    return name.partition(",")[0] == OURS


Candidate = tuple[str, Callable[[], Tensor]]
"""What is particular to a configuration, and a function that computes the output once."""


@dataclass(frozen=True)
class Task:
    """What every contestant computes.

    Attributes:
        module: built of the package's modules; float32, in eval mode.
        inputs: float32, `[B, C, H, W]` each.
        dtype: of inputs, weights and output; what a contestant does in between is its own matter.
        device: "cpu" or "cuda", where a contestant computes; module and inputs are on the CPU.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    dtype: torch.dtype
    device: str = "cpu"

    def channels_last_inputs(self) -> list[Tensor]:
        """The inputs as PyTorch's convolutions like them, at the dtype and on the device."""
        return [
            x.to(self.device, self.dtype, memory_format=torch.channels_last) for x in self.inputs
        ]

    def channels_last_module(self) -> nn.Module:
        """The plain form of the module, in the same way."""
        return plain_channels_last(self.module, self.dtype, self.device)


def and_as_graph(
    task: Task, description: str, compute: Callable[[], Tensor]
) -> Iterator[Candidate]:
    """A candidate, and on a GPU its launches as one CUDA graph too."""
    yield description, compute
    if task.device == "cpu":
        return
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        compute()  # Kernels are compiled and checked, which no capture allows.
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute()

    def replay() -> Tensor:
        graph.replay()
        return output

    yield f"{description}, CUDA graph", replay


def _ours(task: Task) -> Iterator[Candidate]:
    fused = evsam_kernels.fuse(task.module.to(task.device), dtype=task.dtype)
    report: Any = fused.fusion_report
    counts = Counter(block.backend for block in report.swapped)
    description = ", ".join(f"{count} on {backend}" for backend, count in counts.items())
    if task.device == "cpu" and BACKENDS["cpu"].why_unavailable() is None:
        description += f", {importlib.import_module('evsam_kernels._cpu').isa()}"
    inputs = task.channels_last_inputs()
    yield from and_as_graph(task, description, lambda: fused(*inputs))


def _autotuned(task: Task) -> Iterator[Candidate]:
    os.environ[tiling.VARIABLE] = "1"  # Of its process alone.
    yield from _ours(task)


def _eager(task: Task) -> Iterator[Candidate]:
    module, inputs = task.channels_last_module(), task.channels_last_inputs()
    if task.dtype != torch.float32:
        wide = plain_channels_last(task.module, torch.float32, task.device)
        wide_inputs = [x.float() for x in inputs]

        def autocast() -> Tensor:
            with torch.autocast(task.device, task.dtype):
                output: Tensor = wide(*wide_inputs)
                return output

        yield "channels last, autocast", autocast
    yield from and_as_graph(task, "channels last", lambda: module(*inputs))


def _compile(task: Task) -> Iterator[Candidate]:
    from torch._inductor import config

    config.freezing = True  # Folds BatchNorm and packs the weights.
    inputs = task.channels_last_inputs()
    modes = {"freezing, channels last": "default"}
    if task.device != "cpu":
        modes["freezing, channels last, CUDA graph"] = "reduce-overhead"
    torch._dynamo.reset()
    for description, mode in modes.items():
        module = torch.compile(task.channels_last_module(), mode=mode, fullgraph=True)
        yield description, lambda module=module: module(*inputs)  # type: ignore[misc]


def _tensorrt(task: Task) -> Iterator[Candidate]:
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    module = plain(task.module).to(task.device, task.dtype)
    inputs = [x.to(task.device, task.dtype).contiguous() for x in task.inputs]
    settings = {
        "use_explicit_typing": True,  # Computes at the dtype of weights and inputs.
        "min_block_size": 1,  # Leaves single operations to nobody else.
    }
    engine = torch_tensorrt.compile(module, ir="dynamo", inputs=inputs, **settings)
    yield from and_as_graph(task, "dynamo, explicit typing", lambda: engine(*inputs))


class _ChannelsLastOutside(nn.Module):
    """Takes and returns `[B, H, W, C]`, for runtimes that would otherwise have to reorder."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.module(*(x.permute(0, 3, 1, 2) for x in inputs))
        return output.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class _Layout:
    """The task in the order of axes in which a runtime is handed its inputs."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    axes_of_output: tuple[int, ...]


def _layouts(task: Task) -> Iterator[_Layout]:
    """Both orders, for float32 runtimes; which one is faster differs from block to block."""
    module = plain(task.module)
    first = tuple(x.contiguous() for x in task.inputs)
    yield _Layout("channels first", module, first, (0, 1, 2, 3))
    last = tuple(x.permute(0, 2, 3, 1).contiguous() for x in task.inputs)
    yield _Layout("channels last", _ChannelsLastOutside(module).eval(), last, (0, 3, 1, 2))


_OPSET = 20
"""The first with the tanh approximation of GELU as one operator."""


def _onnxruntime(task: Task) -> Iterator[Candidate]:
    import onnxruntime

    for layout in _layouts(task):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Its threads spin during a run, as is their default, but no longer once that is over.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "module.onnx")
            torch.onnx.export(
                layout.module,
                layout.inputs,
                path,
                opset_version=_OPSET,
                dynamo=True,
                verbose=False,
            )
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        # Bound once, so that a run neither copies its inputs nor allocates its output.
        binding = session.io_binding()
        for argument, x in zip(session.get_inputs(), layout.inputs, strict=True):
            binding.bind_cpu_input(argument.name, x.numpy())
        result = session.get_outputs()[0]
        buffer = onnxruntime.OrtValue.ortvalue_from_shape_and_type(result.shape, np.float32)
        binding.bind_ortvalue_output(result.name, buffer)
        output = torch.from_numpy(buffer.numpy()).permute(layout.axes_of_output)

        def run(session: Any = session, binding: Any = binding, output: Tensor = output) -> Tensor:
            session.run_with_iobinding(binding)
            return output

        yield f"ONNX opset {_OPSET}, {layout.name}", run


def _openvino(task: Task) -> Iterator[Candidate]:
    import openvino
    from openvino.preprocess import PrePostProcessor

    storage = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}[task.dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": storage.get_type_name(),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    for layout in _layouts(task):
        shapes = [list(x.shape) for x in layout.inputs]
        converted = openvino.convert_model(layout.module, example_input=layout.inputs, input=shapes)
        processor = PrePostProcessor(converted)
        for index in range(len(shapes)):
            processor.input(index).tensor().set_element_type(storage)
        processor.output().tensor().set_element_type(storage)
        compiled = openvino.Core().compile_model(processor.build(), "CPU", settings)
        request = compiled.create_infer_request()
        for index, (shape, x) in enumerate(zip(shapes, layout.inputs, strict=True)):
            tensor = openvino.Tensor(storage, openvino.Shape(shape))
            _values(tensor, task.dtype).copy_(x)
            request.set_input_tensor(index, tensor)
        output = _values(request.get_output_tensor(), task.dtype).permute(layout.axes_of_output)

        def run(request: Any = request, output: Tensor = output) -> Tensor:
            request.infer()
            return output

        yield f"latency hint, {layout.name}", run


def _values(tensor: Any, dtype: torch.dtype) -> Tensor:
    """The memory of an OpenVINO tensor; NumPy, in between, takes bfloat16 for another type."""
    return torch.from_numpy(tensor.data).view(dtype)


@dataclass(frozen=True)
class Contestant:
    """One who takes part.

    Attributes:
        candidates: turns a task into configurations to choose from.
        packages: what it imports, the package whose version counts first.
        dtypes: what it runs.
        obeys_isa: whether it can be kept from using all of the processor's instruction sets.
        devices: where it runs.
        distribution: what pip calls the first package; "" where that is its name.
    """

    candidates: Callable[[Task], Iterator[Candidate]]
    packages: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    obeys_isa: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    distribution: str = ""

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed, as pip calls them."""
        first, *others = self.packages
        names = {first: self.distribution or first, **{name: name for name in others}}
        return [names[name] for name in names if importlib.util.find_spec(name) is None]

    @property
    def version(self) -> str:
        """The version of the first package."""
        return importlib.metadata.version(self.distribution or self.packages[0])

    def refusal(self, dtype: torch.dtype, isa: str = "native", device: str = "cpu") -> str:
        """Why it does not take part at such settings; "" where it does."""
        if device not in self.devices:
            return f"does not run on {device} here"
        if dtype not in self.dtypes:
            return f"does not run {str(dtype).removeprefix('torch.')}"
        if isa != "native" and not self.obeys_isa:
            return f"cannot be kept to {isa}"
        return ""


CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant(_ours, ("evsam_kernels",)),
    AUTOTUNED: Contestant(_autotuned, ("evsam_kernels",), devices=("cuda",)),
    "eager": Contestant(_eager, ("torch",)),
    "compile": Contestant(_compile, ("torch",)),
    "onnxruntime": Contestant(
        _onnxruntime,
        ("onnxruntime", "onnx", "onnxscript"),
        dtypes=(torch.float32,),
        obeys_isa=False,
        devices=("cpu",),
    ),
    "openvino": Contestant(
        _openvino,
        ("openvino",),
        dtypes=(torch.float32, torch.bfloat16),
        devices=("cpu",),
    ),
    "tensorrt": Contestant(_tensorrt, ("torch_tensorrt",), devices=("cuda",)),
}
PEERS = tuple(name for name in CONTESTANTS if not is_ours(name))
