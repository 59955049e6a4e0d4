"""Which backend runs a call, and the errors of those that cannot."""

from __future__ import annotations

import pytest
import torch

from evsam_kernels import BackendUnavailableError, backends
from evsam_kernels.ops import registry


@pytest.fixture
def unavailable(monkeypatch):
    """Make the cpu backend one that was not built."""
    monkeypatch.setitem(
        backends.BACKENDS,
        "cpu",
        backends.Backend("cpu", "C++", ("cpu",), lambda: "not built; install g++"),
    )
    registry.implementation.cache_clear()
    yield
    registry.implementation.cache_clear()


def test_every_operation_has_a_reference():
    assert all(registry.has_kernel(op, "reference") for op in registry.OPERATIONS)


def test_unknown_backend_lists_the_known():
    with pytest.raises(
        ValueError, match="one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'fastest'"
    ):
        registry.implementation("conv_act", "fastest", "cpu", torch.float32)


def test_named_backend_on_the_wrong_device():
    with pytest.raises(ValueError, match="'cpu' runs on cpu tensors, got a tensor on 'cuda'"):
        registry.implementation("layer_norm_2d", "cpu", "cuda", torch.float32)


def test_named_backend_that_is_unavailable_says_why(unavailable):
    with pytest.raises(BackendUnavailableError, match=r"'cpu' is not available.*install g\+\+"):
        registry.implementation("layer_norm_2d", "cpu", "cpu", torch.float32)


def test_auto_passes_over_what_is_unavailable(unavailable):
    assert registry.chosen_backend("layer_norm_2d", "auto", "cpu", torch.float32) == "reference"


def test_auto_prefers_a_kernel_and_falls_to_the_reference(monkeypatch):
    monkeypatch.setitem(
        backends.BACKENDS, "cpu", backends.Backend("cpu", "C++", ("cpu",), lambda: None)
    )
    monkeypatch.setattr(
        registry,
        "has_kernel",
        lambda op, backend, dtype=None: backend == "reference" or op == "mbconv",
    )
    assert registry.chosen_backend("mbconv", "auto", "cpu", torch.float32) == "cpu"
    assert registry.chosen_backend("conv_act", "auto", "cpu", torch.float32) == "reference"
    assert registry.chosen_backend("mbconv", "auto", "cuda", torch.float32) == "reference"


def test_named_backend_without_a_kernel_says_who_has_one(monkeypatch):
    monkeypatch.setitem(
        backends.BACKENDS, "cpu", backends.Backend("cpu", "C++", ("cpu",), lambda: None)
    )
    monkeypatch.setattr(
        registry, "has_kernel", lambda op, backend, dtype=None: backend == "reference"
    )
    with pytest.raises(
        BackendUnavailableError, match=r"no kernel for conv_act at torch\.float32; it runs on ref"
    ):
        registry.chosen_backend("conv_act", "cpu", "cpu", torch.float32)


def test_float64_runs_where_there_is_a_kernel_for_it():
    assert registry.chosen_backend("conv_act", "auto", "cpu", torch.float64) == "reference"
    with pytest.raises(BackendUnavailableError, match=r"'cpu'.* conv_act at torch\.float64"):
        registry.chosen_backend("conv_act", "cpu", "cpu", torch.float64)
