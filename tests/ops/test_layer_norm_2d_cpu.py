"""The C++ kernel of `layer_norm_2d`, with every instruction set that runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evsam_kernels import ops
from evsam_kernels.backends import build_info
from evsam_kernels.ops.layer_norm_2d.cpu import layer_norm_2d

_cpu = pytest.importorskip("evsam_kernels._cpu", reason=str(build_info.read()))

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def oracle(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> np.ndarray:
    """The formula in numpy's longest floating type: float64 input deserves a better judge."""

    def exact(tensor: Tensor) -> np.ndarray:
        return tensor.double().numpy().astype(np.longdouble)

    rows = exact(x)
    centred = rows - rows.mean(axis=1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.longdouble(eps))
    if weight is not None:
        y = y * exact(weight).reshape(1, -1, 1, 1)
    return y if bias is None else y + exact(bias).reshape(1, -1, 1, 1)


def plain_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same computation by PyTorch at the dtype of `x`."""
    affine = [None if vector is None else vector.to(x.dtype) for vector in (weight, bias)]
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), *affine, eps).permute(0, 3, 1, 2)


def errors(actual: Tensor, expected: np.ndarray) -> tuple[float, float]:
    """Relative error in the Frobenius norm, and largest error relative to the largest element."""
    assert torch.isfinite(actual).all()
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    assert actual.abs().max() > 0
    difference = actual.double().numpy().astype(np.longdouble) - expected
    frobenius = np.sqrt((difference**2).sum()) / np.sqrt((expected**2).sum())
    return float(frobenius), float(np.abs(difference).max() / np.abs(expected).max())


def assert_within_budget(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    expected = oracle(x, weight, bias, eps)
    ours = errors(layer_norm_2d(x, weight, bias, eps), expected)
    plain = errors(plain_torch(x, weight, bias, eps), expected)
    unit_roundoff = torch.finfo(x.dtype).eps / 2
    for our_error, plain_error in zip(ours, plain, strict=True):
        assert our_error <= 2 * plain_error + unit_roundoff


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 17, 64, 256, 300])
def test_error_is_that_of_plain_torch(isa: str, channels: int, dtype: torch.dtype) -> None:
    x = random(2, channels, 5, 7).to(dtype)
    weight, bias = (random(channels, seed=seed).to(dtype) for seed in (1, 2))
    assert_within_budget(x, weight, bias, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda x, top: x * (top / 8), id="large"),
        pytest.param(lambda x, top: x * 1e-6, id="tiny"),
        pytest.param(lambda x, top: x + 100, id="far from zero"),
        pytest.param(lambda x, top: torch.where(x > 1, x * 1000, 0), id="sparse"),
    ],
)
def test_error_on_adversarial_input(isa: str, transform, dtype: torch.dtype) -> None:
    # Squares of what is summed must fit the type of the statistics, in ours and in PyTorch's.
    top = min(torch.finfo(dtype).max, 1e18)
    x = transform(random(1, 96, 4, 4), top).to(dtype)
    assert_within_budget(x, None, None, 1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_mean_is_not_rounded_far_from_zero(isa: str, dtype: torch.dtype) -> None:
    """At 10,000 a rounded mean is off by up to 4,000 units in the last place of the difference."""
    x = (random(1, 96, 4, 4) + 1e4).to(dtype)
    frobenius, largest = errors(layer_norm_2d(x), oracle(x, None, None, 1e-5))
    # Two subtractions, the scale and a product are rounded, each by half a unit.
    assert max(frobenius, largest) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_weight_and_bias_are_optional(
    isa: str, dtype: torch.dtype, with_weight: bool, with_bias: bool
) -> None:
    weight = random(20, seed=1).to(dtype) if with_weight else None
    bias = random(20, seed=2).to(dtype) if with_bias else None
    assert_within_budget(random(1, 20, 3, 3).to(dtype), weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_weight_is_not_rounded(dtype: torch.dtype) -> None:
    x = random(1, 8, 2, 2).to(dtype)
    # 1 + 2^-20 is 1 in half precision: the sum of weight and bias tells whether it was kept.
    weight, bias = torch.full((8,), 2.0**20 + 1), torch.zeros(8)
    expected = oracle(x, weight, bias, 1e-5)
    if dtype == torch.float16:
        expected, weight = expected / 2**20, weight / 2**20
    frobenius, _ = errors(layer_norm_2d(x, weight, bias, 1e-5), expected)
    assert frobenius <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_and_a_single_channel_give_the_bias(isa: str, dtype: torch.dtype) -> None:
    for channels in (1, 3, 64):
        bias = random(channels, seed=2).to(dtype)
        y = layer_norm_2d(torch.full((1, channels, 2, 2), 3.0, dtype=dtype), None, bias, 1e-5)
        assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))


def test_finite_float16_gives_finite_output(isa: str) -> None:
    x = torch.full((1, 64, 1, 1), 65504.0, dtype=torch.float16)
    x[:, ::2] *= -1
    y = layer_norm_2d(x)
    assert torch.equal(y.abs(), torch.ones_like(y))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_results_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """Zero weight leaves the bias, whose rounding is then the kernel's only work."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = every[torch.isfinite(every)].float().sort().values
    middle = exact[:-1] + (exact[1:] - exact[:-1]) / 2
    bits = middle.view(torch.int32)
    values = torch.cat(
        [
            *(exact, middle, (bits + 1).view(torch.float32), (bits - 1).view(torch.float32)),
            torch.tensor([65519.9, 65520.0, 1e30, 3.4e38, float("inf"), float("-inf"), 1e-45]),
        ]
    )
    values = values[values != 0]  # 0 * x + -0.0 is 0.0: the sign of a zero is not the kernel's
    x = torch.zeros(1, values.numel(), 1, 1, dtype=dtype)
    y = layer_norm_2d(x, torch.zeros(values.numel()), values).flatten()
    assert torch.equal(y.view(torch.int16), values.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    x = random(1, 33, 1, 3).to(dtype)
    x[0, 5, 0, 1] = float("nan")
    y = layer_norm_2d(x)
    assert y[..., 1].isnan().all()
    assert y[..., [0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x, id="contiguous"),
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x[:, 1::3, ::2, 1:], id="slice"),
        pytest.param(lambda x: x[:1, :, :1, :1].expand(2, -1, 3, 3), id="expanded"),
        pytest.param(lambda x: x[:, :, :1, :1], id="one pixel"),
        pytest.param(lambda x: x[:, :1], id="one channel"),
        pytest.param(lambda x: x.flip(1), id="flipped"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(view, dtype: torch.dtype) -> None:
    x = view(random(2, 10, 6, 7).to(dtype))
    before = x.clone()
    weight = random(2 * x.shape[1], seed=1).to(dtype)[::2]
    y = layer_norm_2d(x, weight)
    assert torch.equal(y, layer_norm_2d(x.contiguous(), weight.contiguous()))
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_no_pixels(isa: str, shape: tuple[int, ...]) -> None:
    assert layer_norm_2d(torch.empty(shape), torch.ones(8)).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_threads(isa: str, dtype: torch.dtype, threads: None) -> None:
    x = random(1, 67, 41, 43).to(dtype)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(layer_norm_2d(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 17, 33])
def test_stays_within_its_buffers(isa: str, channels: int, dtype: torch.dtype) -> None:
    """NaN round the inputs would show in the output, and the values round the output must stay."""
    rows, margin = 5, 64
    count = rows * channels
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def surrounded(values: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = torch.full((values.numel() + 2 * margin,), float("nan"), dtype=dtype)
        buffer[margin : margin + values.numel()] = values
        return buffer

    def address(buffer: Tensor) -> int:
        return buffer.data_ptr() + margin * buffer.element_size()

    x = surrounded(random(count), dtype)
    weight, bias = (surrounded(random(channels, seed=seed), wide) for seed in (1, 2))
    y = torch.full((count + 2 * margin,), 123.0, dtype=dtype)
    _cpu.layer_norm_2d(
        x=address(x),
        y=address(y),
        weight=address(weight),
        bias=address(bias),
        rows=rows,
        channels=channels,
        eps=1e-5,
        dtype=str(dtype).removeprefix("torch."),
        num_threads=1,
    )
    assert torch.isfinite(y).all()
    assert torch.equal(y[:margin], torch.full_like(y[:margin], 123))
    assert torch.equal(y[-margin:], torch.full_like(y[-margin:], 123))


def test_operation_runs_this_kernel() -> None:
    x, weight = random(1, 12, 3, 3).float(), random(12, seed=1).float()
    y = ops.layer_norm_2d(x, weight, eps=1e-3, backend="cpu")
    assert torch.equal(y, layer_norm_2d(x, weight, eps=1e-3))


def test_rejects_tensors_it_cannot_read() -> None:
    with pytest.raises(TypeError, match=r"takes torch.float16, .*got torch.int32"):
        layer_norm_2d(torch.zeros(1, 2, 3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="takes tensors on the CPU, got one on meta"):
        layer_norm_2d(torch.zeros(1, 2, 3, 3, device="meta"))
    with pytest.raises(ValueError, match="takes tensors on the CPU, got one on meta"):
        layer_norm_2d(torch.zeros(1, 2, 3, 3), None, torch.zeros(2, device="meta"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1}, "rows must be at least 0, got -1"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be float16, .*, got 'int8'"),
        ({"x": 0}, "x must be the address of a tensor's elements, got 0"),
        ({"y": -8}, "y must be the address of a tensor's elements, got -8"),
        ({"weight": 0}, "weight must be the address"),
        ({"bias": 4097}, "bias must be aligned to its element size, got 4097"),
        ({"rows": 2**62, "channels": 2**62}, "more elements than memory can hold"),
    ],
)
def test_binding_rejects_bad_arguments(changed: dict[str, object], message: str) -> None:
    x, y, vector = torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(4)
    good = {
        **{"x": x.data_ptr(), "y": y.data_ptr()},
        **{"weight": vector.data_ptr(), "bias": vector.data_ptr()},
        **{"rows": 2, "channels": 4, "eps": 1e-5, "dtype": "float32", "num_threads": 1},
    }
    _cpu.layer_norm_2d(**good)
    with pytest.raises(ValueError, match=message):
        _cpu.layer_norm_2d(**(good | changed))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


LOAD_EXTENSION_ALONE = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cpu", {_cpu.__file__!r})
_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cpu)
print(_cpu.isa())
"""


def test_instruction_set_can_be_named_in_the_environment() -> None:
    assert run_python(LOAD_EXTENSION_ALONE, EVSAM_CPU_ISA="portable").stdout == "portable\n"
    default = run_python(LOAD_EXTENSION_ALONE, EVSAM_CPU_ISA="").stdout
    *_, fastest = _cpu.available_isas()
    if fastest == "avx512_bf16" and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        fastest = "avx512"  # Only AMD's processors gain by the other.
    assert default == fastest + "\n"


def test_unknown_instruction_set_is_an_error_naming_the_known() -> None:
    accepted = ", ".join(_cpu.available_isas())
    with pytest.raises(ValueError, match=f"isa must be one of {accepted} .* got 'mmx'"):
        _cpu.use_isa("mmx")
    result = run_python(LOAD_EXTENSION_ALONE, EVSAM_CPU_ISA="mmx")
    assert result.returncode != 0
    assert f"ValueError: EVSAM_CPU_ISA must be one of {accepted} " in result.stderr


COUNT_THREADS = """
import os
import torch
from evsam_kernels.ops.layer_norm_2d.cpu import layer_norm_2d
torch.set_num_threads(3)
x = torch.randn(1, 64, 64, 64)
torch.nn.functional.layer_norm(x, (64,))
before = len(os.listdir("/proc/self/task"))
layer_norm_2d(x)
print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(
    not build_info.read().compiler.startswith(("g++", "c++")) or sys.platform != "linux",
    reason="only g++ shares PyTorch's OpenMP runtime, and only Linux lists threads in /proc",
)
def test_kernels_run_on_the_threads_of_pytorch() -> None:
    before, after = run_python(COUNT_THREADS).stdout.split()
    assert before == after
    assert int(after) >= 3
