"""The first call of a kernel on a GPU is held against float64; the executor is the GPU here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import evsam_kernels as ek
from evsam_kernels import backends, cuda
from evsam_kernels.backends import build_info
from evsam_kernels.ops import registry, self_check
from evsam_kernels.ops.self_check import SelfCheckError
from evsam_kernels.simt.module import Module

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not build_info.read().cuda_built, reason="the CUDA kernels were not built"
)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are on a GPU, the executor, where "auto" has CUDA kernels."""
    monkeypatch.setattr(self_check, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(backends, "auto_order", lambda device_type: ("cuda", "reference"))
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    self_check.forget()
    registry.implementation.cache_clear()
    with ek.simt.emulate(check=False):
        yield
    self_check.forget()
    registry.implementation.cache_clear()


@pytest.fixture(scope="module")
def corrupted() -> Module:
    """The kernels of mbconv, whose ReLU keeps what it should drop."""
    ptx = cuda._module("mbconv").ptx
    assert "setp.gt.f32" in ptx
    return Module(ptx.replace("setp.gt.f32", "setp.lt.f32"))


def mbconv(backend: str, channels: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return ek.ops.mbconv(
        normal(1, channels, 5, 4),
        *(normal(8, channels, 1, 1), normal(8), normal(8, 1, 3, 3), normal(8), normal(8, 8, 1, 1)),
        *(normal(8), None),
        activation="relu",
        backend=backend,
    )


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formulas that were computed."""
    computed: list[str] = []
    formula = registry.formula

    def watched(op: str):
        def compute(*operands):
            computed.append(op)
            return formula(op)(*operands)

        return compute

    monkeypatch.setattr(registry, "formula", watched)
    return computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sound_kernel_is_checked_once_for_a_layer(dtype, formulas) -> None:
    first = mbconv("cuda", dtype=dtype)
    assert len(formulas) == 2
    assert torch.equal(mbconv("cuda", dtype=dtype), first)
    assert len(formulas) == 2
    mbconv("cuda", channels=16, dtype=dtype)
    assert len(formulas) == 4


def test_tf32_is_sound_where_it_is_allowed(formulas, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    mbconv("cuda")
    assert len(formulas) == 3


def test_a_corrupted_kernel_that_was_asked_for_is_an_error(corrupted, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_module", lambda source: corrupted)
    message = (
        r"cuda kernel of mbconv at torch\.float32, input \[1, 8, 5, 4\], is wrong on cpu: the "
    )
    for _ in range(2):
        with pytest.raises(SelfCheckError, match=message):
            mbconv("cuda")


def test_auto_warns_once_and_takes_the_reference(corrupted, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_module", lambda source: corrupted)
    reference = mbconv("reference")
    with pytest.warns(UserWarning, match=r"cuda kernel of mbconv .* the reference takes its place"):
        assert torch.equal(mbconv("auto"), reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mbconv("auto"), reference)
        mbconv("auto", channels=16)
    assert registry.chosen_backend("mbconv", "auto", "cpu", torch.float32) == "reference"
    assert registry.chosen_backend("mbconv", "auto", "cpu", torch.float16) == "cuda"


def test_it_can_be_turned_off(corrupted, formulas, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_module", lambda source: corrupted)
    monkeypatch.setenv("EVSAM_SELF_CHECK", "0")
    wrong = mbconv("cuda")
    assert formulas == []
    assert not torch.allclose(wrong, mbconv("reference"))
    monkeypatch.setenv("EVSAM_SELF_CHECK", "no")
    with pytest.raises(ValueError, match="EVSAM_SELF_CHECK must be 0 or 1, got 'no'"):
        mbconv("cuda")


def test_a_capture_puts_the_check_off(formulas, monkeypatch) -> None:
    monkeypatch.setattr(self_check, "_is_capturing", lambda tensor: True)
    mbconv("cuda")
    assert formulas == []
    monkeypatch.setattr(self_check, "_is_capturing", lambda tensor: False)
    mbconv("cuda")
    assert len(formulas) == 2


def test_nan_in_the_result_is_found_and_in_the_operands_is_not_a_fault() -> None:
    x = torch.ones(1, 2, 2, 2)

    def check(result: Tensor, oracle: Tensor) -> str:
        return self_check._problem(result, lambda dtype: oracle.to(dtype))

    broken = x.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert "inf or NaN" in check(broken, x)
    assert check(x, broken) == ""
    assert check(x.half(), x * 1e6) == ""
    assert check(torch.zeros_like(x), torch.zeros_like(x)) == ""
    assert "Frobenius" in check(x * 1.001, x)
