"""The plain form of a model: the same numbers, and nothing of the package's operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.plain import evaluate, plain
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


def test_it_computes_the_same_without_the_packages_operations(tiny_encoder: Any) -> None:
    encoder = tiny_encoder.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, used = run(encoder, x)
    assert NAMESPACE in used
    found, used = run(plain(encoder), x)
    assert NAMESPACE not in used
    torch.testing.assert_close(found, expected)


def test_the_model_itself_is_left_as_it_was(tiny_encoder: Any) -> None:
    before = {name: type(module) for name, module in tiny_encoder.named_modules()}
    copied = plain(tiny_encoder)
    assert {name: type(module) for name, module in tiny_encoder.named_modules()} == before
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in tiny_encoder.parameters())


def test_evaluation_is_at_the_dtype_asked_for(tiny_encoder: Any) -> None:
    x = torch.randn(1, 3, 64, 64)
    oracle = evaluate(tiny_encoder, (x,), torch.float64)
    coarse = evaluate(tiny_encoder, (x,), torch.bfloat16)
    assert (oracle.dtype, coarse.dtype) == (torch.float64, torch.bfloat16)
    error = (coarse.double() - oracle).norm() / oracle.norm()
    assert 1e-4 < error < 0.1
    assert next(tiny_encoder.parameters()).dtype == torch.float32
