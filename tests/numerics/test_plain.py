"""The plain form of a model: the same numbers, and nothing of the package's operations."""

from __future__ import annotations

from typing import Any

import torch
from support.models import small_encoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evsam_kernels.nn import LiteMLA
from evsam_kernels.numerics.budget import measure
from evsam_kernels.numerics.plain import evaluate, plain, yardstick
from evsam_kernels.ops.registry import NAMESPACE


class _Namespaces(TorchDispatchMode):
    """Collects the namespaces of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.found.add(func.namespace)
        return func(*args, **(kwargs or {}))


def run(module: Any, x: Tensor) -> tuple[Tensor, set[str]]:
    with torch.no_grad(), _Namespaces() as namespaces:
        return module(x), namespaces.found


def test_it_computes_the_same_without_the_packages_operations() -> None:
    encoder = small_encoder().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, used = run(encoder, x)
    assert NAMESPACE in used
    found, used = run(plain(encoder), x)
    assert NAMESPACE not in used
    torch.testing.assert_close(found, expected)


def test_the_model_itself_is_left_as_it_was() -> None:
    encoder = small_encoder()
    before = {name: type(module) for name, module in encoder.named_modules()}
    copied = plain(encoder)
    assert {name: type(module) for name, module in encoder.named_modules()} == before
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_evaluation_is_at_the_dtype_asked_for() -> None:
    x, encoder = torch.randn(1, 3, 64, 64), small_encoder()
    oracle = evaluate(encoder, (x,), torch.float64)
    coarse = evaluate(encoder, (x,), torch.bfloat16)
    assert (oracle.dtype, coarse.dtype) == (torch.float64, torch.bfloat16)
    error = (coarse.double() - oracle).norm() / oracle.norm()
    assert 1e-4 < error < 0.1
    assert next(encoder.parameters()).dtype == torch.float32


def test_the_yardstick_is_at_the_dtype_where_that_is_of_use() -> None:
    encoder, x = small_encoder(), torch.randn(1, 3, 64, 64)
    oracle = evaluate(encoder, (x,), torch.float64)
    found, errors, how = yardstick(encoder, (x,), torch.bfloat16, oracle)
    assert how == "bfloat16"
    assert found.equal(evaluate(encoder, (x,), torch.bfloat16))
    assert errors.frobenius > 1e-3
    narrow, errors, how = yardstick(encoder, (1e5 * x,), torch.float16, oracle)
    assert how == "float32 rounded to float16"
    assert narrow.dtype == torch.float16


def test_the_yardstick_widens_normalisation_and_attention_first() -> None:
    """Keys and values of about 2,000 fit float16; their products and sums do not."""
    encoder, x = small_encoder(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, LiteMLA):
                module.qkv.conv.weight *= 1000
    oracle = evaluate(encoder, (x,), torch.float64)
    assert not evaluate(encoder, (x,), torch.float16).isfinite().all()
    found, errors, how = yardstick(encoder, (x,), torch.float16, oracle)
    assert how == "float16, float32 in normalisation and attention"
    assert found.dtype == torch.float16
    rounded = evaluate(encoder, (x,), torch.float32).half()
    assert 2 * measure(rounded, oracle).frobenius < errors.frobenius < 1e-2


def test_wide_computes_the_same() -> None:
    encoder, x = small_encoder(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(
        evaluate(encoder, (x,), torch.float32, wide=True), evaluate(encoder, (x,), torch.float32)
    )
