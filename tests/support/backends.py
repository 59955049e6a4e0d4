"""Backends made up by tests."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from evsam_kernels.backends import BACKENDS, Backend
from evsam_kernels.ops import registry
from evsam_kernels.ops.checks import FLOATING_DTYPES


@contextmanager
def made_up_backend(name: str, **kernels: Callable[..., Tensor]) -> Iterator[None]:
    """A backend whose kernels are the functions given, by operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, name, Backend(name, "tests", None, lambda: None))
        for op, kernel in kernels.items():
            module = types.ModuleType(f"evsam_kernels.ops.{op}.{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            setattr(module, op, kernel)
            module.DTYPES = FLOATING_DTYPES
            patch.setitem(sys.modules, module.__name__, module)
        registry.implementation.cache_clear()
        try:
            yield
        finally:
            registry.implementation.cache_clear()
