"""Every Triton kernel compiles for every architecture, without spills and in its memory."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import evsam_kernels as ek
from evsam_kernels import simt
from evsam_kernels.numerics.cases import Case
from evsam_kernels.numerics.tf32 import tf32
from evsam_kernels.ops import tiling
from evsam_kernels.ops.tiling import Entry
from evsam_kernels.simt import emulation, toolchain
from evsam_kernels.simt.occupancy import max_shared

triton = pytest.importorskip("triton", reason="Triton is not installed")

NVIDIA = (80, 86, 89, 90, 100, 120)
AMD_SHARED = 64 << 10


@dataclass
class Compiled:
    """What Triton made, by name of the kernel and number of the call."""

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> Iterator[Compiled]:
    """Have launches compile and nothing more."""
    made = Compiled()

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            cache = triton.runtime.cache.get_cache_manager(metadata.hash)
            files = cache.get_group(f"{source.name[:150]}.json")
            name = f"{metadata.name} {len(made.files)}"
            made.files[name] = {Path(path).suffix[1:]: Path(path) for path in files.values()}
            made.shared[name] = metadata.shared

        def __call__(self, *_: Any) -> None:
            return None

    monkeypatch.setattr(emulation, "_Launcher", Launcher)
    # Triton keeps launchers by device.
    monkeypatch.setattr(emulation._Driver, "get_current_device", lambda self: str(tmp_path))
    yield made


def _operands(op: str, dtype: torch.dtype, **settings: Any) -> Callable[[], object]:
    operands = Case(op, "aot", settings).operands(dtype)
    if op == "upsample_add":
        operands["size"] = (operands.pop("height"), operands.pop("width"))
    return lambda: getattr(ek.ops, op)(**operands, backend="triton")


def tensor_core_calls(dtype: torch.dtype) -> list[Callable[[], object]]:
    """Calls that take every tile of the products at a dtype once."""
    conv = {"kernel": 1, "activation": "gelu"}
    calls = [
        _operands("conv_act", dtype, channels=(64, 256), size=(160, 128), **conv),
        _operands("conv_act", dtype, channels=(64, 64), size=(9, 8), **conv),
        _operands("conv_act", dtype, channels=(128, 256), size=(160, 128), residual=True, **conv),
        _operands("conv_act", dtype, channels=(32, 32), size=(160, 180), residual=True),
        _operands("conv_act", dtype, channels=(3, 32), size=(64, 64), stride=2),
        _operands("multi_scale_attention", dtype, channels=(64, 64), size=(8, 9)),
    ]
    for channels, stride in (
        ((32, 512, 64), 2),
        ((64, 256, 64), 1),
        ((64, 1024, 128), 2),
        ((256, 256, 256), 1),
        ((8, 32, 16), 1),
    ):
        calls.append(
            _operands("fused_mbconv", dtype, channels=channels, size=(8, 8), stride=stride)
        )
    return calls


def other_calls(dtype: torch.dtype) -> list[Callable[[], object]]:
    """Calls of the kernels whose time is that of memory."""
    return [
        _operands("mbconv", dtype, channels=(16, 64, 16), size=(8, 8)),
        _operands("layer_norm_2d", dtype, channels=256, size=(8, 8)),
        _operands("upsample_add", dtype, channels=64, inputs=((4, 4), (8, 8), (16, 16))),
        _operands("upsample_add", dtype, channels=64, inputs=((4, 4), (7, 9), (16, 16))),
        _operands("relu_linear_attention", dtype, heads=1, head_dim=32, size=(40, 32)),
    ]


def backward(dtype: torch.dtype) -> None:
    for size in ((40, 32), (4, 5)):
        qkv = torch.randn(1, 96, *size).to(dtype).requires_grad_()
        ek.ops.relu_linear_attention(qkv, head_dim=32, backend="triton").sum().backward()


def _spilled(cubin: Path) -> list[str]:
    """Instructions that keep registers in local memory."""
    usage = toolchain.run("cuobjdump", ["--dump-resource-usage", cubin])
    if re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]:
        return []
    return re.findall(r"\b(?:STL|LDL)\b.*", toolchain.run("cuobjdump", ["--dump-sass", cubin]))


# Every dtype for one architecture, and every architecture at one dtype.
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(arch, torch.float16) for arch in NVIDIA] + [(80, torch.bfloat16), (80, torch.float32)],
    ids=str,
)
def test_nvidia(arch, dtype, compiled):
    with tf32(True), simt.emulate(arch):
        for call in tensor_core_calls(dtype):
            call()
        products = list(compiled.files)
        for call in other_calls(dtype):
            call()
        backward(dtype)
    assert len(compiled.files) >= 20 if arch == 80 and dtype == torch.float16 else compiled.files
    for name, files in compiled.files.items():
        assert not _spilled(files["cubin"]), f"{name} spills"
        assert compiled.shared[name] <= max_shared(arch), name
        if name in products and not name.startswith(("largest", "layer", "upsample")):
            ptx = files["ptx"].read_text(encoding="utf-8")
            assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx), name


def table_calls(arch: int) -> list[Callable[[], object]]:
    """Calls that take each of the table's tiles on an architecture once."""
    calls = {}
    for entry in tiling.entries():
        if arch in entry.architectures:
            # The kernel of `conv_act` is the same for other numbers of channels.
            channels = () if entry.operation == "conv_act" else entry.channels
            calls[entry.operation, channels, entry.kernel, entry.stride, entry.tile] = entry
    return [functools.partial(_call_of, entry) for entry in calls.values()]


def _call_of(entry: Entry) -> None:
    half = {"dtype": torch.float16, "memory_format": torch.channels_last}
    lines = 32
    size = (entry.stride * lines, entry.stride * entry.least_pixels // lines)
    x = torch.empty(1, entry.channels[0], *size, **half)
    weights = []
    for kernel, (inside, outside) in zip(
        (entry.kernel, 1), itertools.pairwise(entry.channels), strict=False
    ):
        weight = torch.empty(outside, inside, kernel, kernel, **half)
        weights += [weight, torch.empty(outside, dtype=torch.float16)]
    residual = torch.empty(1, entry.channels[-1], lines, entry.least_pixels // lines, **half)
    settings = {"stride": entry.stride, "activation": "gelu", "backend": "triton"}
    getattr(ek.ops, entry.operation)(x, *weights, residual=residual, **settings)


@pytest.mark.parametrize("arch", [80, 86, 89, 120])
def test_the_tables_tiles(arch, compiled, monkeypatch):
    taken = set()
    for op in ("conv_act", "fused_mbconv"):
        kernels = importlib.import_module(f"evsam_kernels.ops.{op}.triton")

        def choose(*arguments, chosen=kernels.choose):
            tile = chosen(*arguments)
            taken.add(tile)
            return tile

        monkeypatch.setattr(kernels, "choose", choose)
    with simt.emulate(arch):
        for call in table_calls(arch):
            call()
    assert taken == {entry.tile for entry in tiling.entries() if arch in entry.architectures}
    for name, files in compiled.files.items():
        assert not _spilled(files["cubin"]), f"{name} spills"
        assert compiled.shared[name] <= max_shared(arch), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_amd(dtype, compiled, monkeypatch):
    target = triton.backends.compiler.GPUTarget("hip", "gfx942", 64)
    monkeypatch.setattr(emulation._Driver, "get_current_target", lambda self: target)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr("evsam_kernels.ops.gpu.max_shared", lambda arch: AMD_SHARED)
    monkeypatch.setattr(tiling, "table", dict)  # It has none for AMD.
    with tf32(True), simt.emulate():
        for call in tensor_core_calls(dtype):
            call()
        products = list(compiled.files)
        if dtype == torch.float16:
            for call in other_calls(dtype):
                call()
    for name, files in compiled.files.items():
        code = files["amdgcn"].read_text(encoding="utf-8")
        for kind in ("vgpr", "sgpr"):
            (spilled,) = set(re.findall(rf"\.{kind}_spill_count:\s+(\d+)", code))
            assert spilled == "0", f"{name} spills {spilled} {kind}"
        assert compiled.shared[name] <= AMD_SHARED, name
        if name in products and name.startswith(("conv_kernel", "fused_mbconv")):
            assert "v_mfma" in code, name
