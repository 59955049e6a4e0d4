"""The fused encoder through PyTorch's compilers, and the encoder in ONNX Runtime."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import evsam_kernels as ek
from evsam_kernels.numerics.budget import budget, measure

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler: install g++"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def more(pictures: Tensor) -> Tensor:
    """Three other pictures of that size."""
    return torch.cat([pictures.flip(0), -pictures[:1]])


@needs_compiler
# Its caches on disk know an operator by name: those of another version of this package would do.
@torch._inductor.config.patch(force_disable_caches=True)
def test_compiled_in_one_graph(fused, pictures):
    compiled = torch.compile(fused, fullgraph=True)
    expected = fused(pictures)
    found = compiled(pictures)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_one_dynamic_graph_serves_all_batches(fused, pictures):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for x in (pictures, torch.cat([pictures] * 2), torch.cat([pictures, more(pictures)])):
        assert torch.equal(compiled(x), fused(x))
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0] > 0


def exported_for_any_batch(fused, pictures: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(
        fused, (pictures,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)
    )


def test_exported_and_saved(fused, pictures):
    exported = exported_for_any_batch(fused, pictures)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    operations = {f"evsam.{block.operation}.default" for block in fused.fusion_report.swapped}
    assert operations <= called
    assert not any("conv" in name for name in called - operations)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about its archive.
        torch.export.save(exported, file)
        file.seek(0)
        loaded = torch.export.load(file)
    for x in (pictures, more(pictures), pictures[:1]):
        assert torch.equal(loaded.module()(x), fused(x))


_LOAD_AND_RUN = """
import sys, torch, evsam_kernels
package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(x) for x in torch.load(inputs)], outputs)
"""


@needs_compiler
def test_compiled_ahead_of_time(fused, pictures, tmp_path):
    """With AOTInductor; another process, which has imported the package, runs it."""
    package = torch._inductor.aoti_compile_and_package(
        exported_for_any_batch(fused, pictures), package_path=str(tmp_path / "encoder.pt2")
    )
    given = [pictures, more(pictures)]
    torch.save(given, tmp_path / "inputs.pt")
    files = [package, str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    subprocess.run(
        [sys.executable, "-c", _LOAD_AND_RUN, *files],
        check=True,
        cwd=Path(ek.__file__).parents[1],
        timeout=120,
    )
    for x, found in zip(given, torch.load(tmp_path / "outputs.pt"), strict=True):
        assert torch.equal(found, fused(x))


@pytest.mark.parametrize("which", ["encoder", "fused"])
def test_parity_in_onnx_runtime(which, encoder, pictures, tmp_path, request):
    """An export holds the formulas of the operations, in ONNX's own operators."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "encoder.onnx")
    torch.onnx.export(
        request.getfixturevalue(which),
        (pictures,),
        path,
        opset_version=20,  # The first with the tanh approximation of GELU as one operator.
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "batch"},),
    )
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(encoder).double()
    for x in (pictures, more(pictures)):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        want = exact(x.double())
        plain = measure(encoder(x), want)
        assert measure(torch.from_numpy(found), want).within(budget(plain, torch.float32))
