"""The CUDA kernel of `mbconv`, run in the executor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import evsam_kernels as ek
from evsam_kernels import cuda, simt
from evsam_kernels.backends import BACKENDS, BackendUnavailableError, build_info
from evsam_kernels.numerics.budget import assert_within_budget
from evsam_kernels.numerics.cases import CASES, Case
from evsam_kernels.numerics.tf32 import tf32
from evsam_kernels.numerics.validation import Step, validate
from evsam_kernels.ops.mbconv.tiles import tile_of
from evsam_kernels.simt import toolchain

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("evsam_kernels._simt", reason="the executor was not built")
if not build_info.read().cuda_built:
    pytest.skip(str(build_info.read()), allow_module_level=True)

expand_depthwise = pytest.importorskip("evsam_kernels.ops.mbconv.cuda").expand_depthwise
SOURCES = Path(__file__).parents[2] / "csrc/cuda"


@pytest.fixture
def full_precision():
    """float32 products as float32, which is what they are held against."""
    with tf32(False):
        yield


STEPS = [
    Step(case, dtype, ("cuda",))
    for case in CASES["mbconv"]
    for dtype in ("float16", "bfloat16", "float32")
    if dtype == "float16" or case.quick
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.case.name}-{step.dtype}")
def test_case(step, full_precision):
    with simt.emulate() as emulation:
        (rows,) = validate([step])
    failed = [str(row) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)
    assert emulation.launches, "nothing ran in the executor"


@pytest.mark.parametrize(
    "settings",
    [
        # Every number of input pixels that a tile has room for, with tiles inside the map.
        {"channels": (32, 128, 24), "size": (32, 32), "activation": "gelu"},
        {"channels": (24, 72, 16), "size": (33, 70), "stride": 2, "activation": "gelu"},
        {"channels": (16, 64, 16), "size": (32, 32), "stride": 2, "activation": "gelu"},
        {"channels": (16, 64, 16), "size": (1, 90), "activation": "gelu"},
        {"channels": (16, 64, 16), "size": (90, 2), "kernel": 5, "activation": "silu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles(settings, dtype):
    operands = Case("mbconv", "tiles", settings).operands(dtype)
    with simt.emulate():
        assert_within_budget("mbconv", operands, "cuda")


def test_tf32_is_pytorchs_setting():
    operands = Case("mbconv", "tf32", {"channels": (40, 48, 24), "size": (6, 7)}).operands(
        torch.float32
    )
    results = []
    for allowed in (False, True):
        with tf32(allowed), simt.emulate() as emulation:
            results.append(ek.ops.mbconv(**operands, backend="cuda"))
        name = "tf32" if allowed else "float32"
        assert any(f"_{name}_" in launch.report.kernel for launch in emulation.launches)
    error = (results[0] - results[1]).norm() / results[0].norm()
    assert 1e-5 < error < 2**-9


def test_operands_at_odd_addresses():
    case = next(case for case in CASES["mbconv"] if case.name == "random")
    operands = case.operands(torch.float16)
    moved = {
        name: torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
        if torch.is_tensor(value)
        else value
        for name, value in operands.items()
    }
    with simt.emulate():
        want = ek.ops.mbconv(**operands, backend="cuda")
        assert torch.equal(ek.ops.mbconv(**moved, backend="cuda"), want)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_images_do_not_depend_on_their_batch(batch):
    case = Case("mbconv", "batch", {"channels": (16, 64, 24), "size": (5, 6), "batch": 3})
    operands = case.operands(torch.bfloat16)
    part = {**operands, "x": operands["x"][:batch]}
    with simt.emulate():
        whole = ek.ops.mbconv(**operands, backend="cuda")
        some = ek.ops.mbconv(**part, backend="cuda")
    assert torch.equal(some, whole[:batch])
    assert some.is_contiguous(memory_format=torch.channels_last)


def test_maps_that_are_too_large_are_refused():
    x = torch.empty(1, 8, 1, 1, dtype=torch.float16, device="cpu").expand(1, 8, 20000, 20000)
    weights = [torch.zeros(8, 8, 1, 1), None, torch.zeros(8, 1, 3, 3), None]
    weights = [None if weight is None else weight.half() for weight in weights]
    with simt.emulate(), pytest.raises(ValueError, match=r"less than 2\*\*31 elements an image"):
        expand_depthwise(x, *weights, None, None, 1, "gelu")


def test_every_tile_holds_its_input():
    for size in ((1, 1), (7, 90), (16, 16), (32, 32), (33, 17), (64, 64), (200, 3)):
        for stride, kernel, special in ((1, 3, True), (2, 3, True), (3, 7, False), (1, 1, False)):
            tile = tile_of(torch.float16, 16, size, kernel, stride, special, 16, 108, 166912)
            under = [min((n - 1) * stride + kernel, m) for n, m in zip(tile[:2], size, strict=True)]
            assert under[0] * under[1] <= tile.rows
            assert tile.shared <= 166912


def test_without_a_gpu_it_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "finds no GPU" in str(BACKENDS["cuda"].why_unavailable())
    x = torch.zeros(1, 8, 4, 4)
    weight = torch.zeros(8, 8, 1, 1)
    with pytest.raises(BackendUnavailableError, match="'cuda' is not available here: PyTorch"):
        ek.ops.mbconv(x, weight, None, torch.zeros(8, 1, 3, 3), None, weight, backend="cuda")


MUTATIONS = {
    "vectors are used before all threads have copied them": (
        "  wait_for_copies<0>();\n  __syncthreads();\n",
        "  wait_for_copies<0>();\n",
    ),
    "a stage is used before it is there": (
        "wait_for_copies<kStages - 2>();",
        "wait_for_copies<kStages - 1>();",
    ),
    "a stage is overwritten while others use it": (
        "    wait_for_copies<kStages - 2>();\n    __syncthreads();\n",
        "    wait_for_copies<kStages - 2>();\n",
    ),
    "the stencil starts before the tile is there": (
        "    }\n  }\n  __syncthreads();\n\n  const int channel",
        "    }\n  }\n\n  const int channel",
    ),
    "weights beyond the last channel are read": (
        "inside && first + own_row < mid_channels - first_channel;",
        "inside;",
    ),
    "there are no zeros around the map": (
        "if (y < 0 || y >= height || column < 0 || column >= width) {",
        "if (y < 0) {",
    ),
    "results beyond the map are written": (
        "out_y + line < given.out_height && out_x + i < given.out_width",
        "out_x + i < given.out_width",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation, monkeypatch, tmp_path):
    try:
        toolchain.find("nvcc")
    except toolchain.ToolNotFoundError as error:
        pytest.skip(str(error))
    text = (SOURCES / "mbconv.cu").read_text()
    before, after = MUTATIONS[mutation]
    assert text.count(before) == 1
    # One kernel compiles faster than all.
    start = text.index("EVSAM_GELU(float16_stride1,")
    only = "EVSAM_KERNEL(float16_stride1_256, 2, 4, evsam::half, evsam::Float32::tf32, 4, 4,"
    only += " evsam::Activation::gelu, evsam::kStride1)\n"
    path = tmp_path / "mbconv.cu"
    path.write_text(text[:start].replace(before, after) + only)
    module = simt.compile_cuda(path, options=["-std=c++20", f"-I{SOURCES}"])
    monkeypatch.setattr(cuda, "_module", lambda source: module)
    settings = {"channels": (136, 72, 16), "size": (11, 13), "activation": "gelu"}
    operands = Case("mbconv", "mutated", settings).operands(torch.float16)
    with simt.emulate(), pytest.raises((simt.FaultError, AssertionError)):
        assert_within_budget("mbconv", operands, "cuda")
