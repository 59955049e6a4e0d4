"""Which backends exist here, why the others do not, and in what order "auto" tries them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from evsam_kernels.backends import build_info
from evsam_kernels.simt import emulation

__all__ = ["AUTO", "BACKENDS", "Backend", "BackendUnavailableError", "auto_order", "require"]

AUTO = "auto"
_OLDEST = (8, 0)
"""Compute capability that the CUDA kernels are compiled for."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """One way of executing an operation.

    Attributes:
        name: what users type.
        executes: what runs its kernels, for people.
        device_types: `torch.device.type` values it accepts; None means every device.
        why_unavailable: returns None where the backend can run, else the reason and the remedy.
        emulated: whether `simt.emulate` has its kernels run in the executor, on tensors on the CPU.
    """

    name: str
    executes: str
    device_types: tuple[str, ...] | None
    why_unavailable: Callable[[], str | None]
    emulated: bool = False

    def accepts(self, device_type: str) -> bool:
        if self.emulated and emulation.current() is not None:
            return device_type == "cpu"
        return self.device_types is None or device_type in self.device_types


def _cpu_unavailable() -> str | None:
    try:
        importlib.import_module("evsam_kernels._cpu")
    except ImportError as error:
        built = build_info.read()
        if built.cpu_built:
            return f"the C++ kernels were built but cannot be loaded: {error}"
        return (
            f"the C++ kernels were not built ({built.cpu_reason}); reinstall with EVSAM_BUILD_CPU=1"
        )
    return None


def _triton_unavailable() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    return _gpu_unavailable()


def _cuda_unavailable() -> str | None:
    built = build_info.read()
    if not built.cuda_built:
        return (
            f"the CUDA kernels were not built ({built.cuda_reason}); "
            "reinstall with EVSAM_BUILD_CUDA=1"
        )
    reason = _gpu_unavailable()
    if reason is None and emulation.current() is None:
        if torch.version.cuda is None:
            return "this PyTorch is not for NVIDIA's GPUs; choose backend='triton'"
        capability = torch.cuda.get_device_capability()
        if capability < _OLDEST:
            return (
                f"the GPU has compute capability {capability[0]}.{capability[1]}, the CUDA kernels "
                f"need {_OLDEST[0]}.{_OLDEST[1]}; choose backend='reference'"
            )
    return reason


def _gpu_unavailable() -> str | None:
    if emulation.current() is None and not torch.cuda.is_available():
        return (
            "PyTorch finds no GPU; its kernels can be run without one in "
            "`with evsam_kernels.simt.emulate():`"
        )
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", "PyTorch, on any device", None, lambda: None),
        Backend("cpu", "C++ kernels, on the CPU", ("cpu",), _cpu_unavailable),
        Backend(
            "triton", "Triton kernels, on a GPU", ("cuda",), _triton_unavailable, emulated=True
        ),
        Backend("cuda", "CUDA kernels, on a GPU", ("cuda",), _cuda_unavailable, emulated=True),
    )
}


def require(name: str, device_type: str) -> Backend:
    """Return the backend called `name`, ready to run on `device_type`.

    Raises:
        ValueError: no backend has that name, or it does not run on such a device.
        BackendUnavailableError: it exists but cannot run on this machine.
    """
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, [AUTO, *BACKENDS]))}, got {name!r}"
        )
    reason = backend.why_unavailable()
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available here: {reason}")
    if not backend.accepts(device_type):
        accepted = ("cpu",) if emulation.current() else backend.device_types or ()
        raise ValueError(
            f"backend {name!r} runs on {' or '.join(accepted)} tensors, "
            f"got a tensor on {device_type!r}; move the tensor or choose another backend"
        )
    return backend


def auto_order(device_type: str) -> tuple[str, ...]:
    """Names of the backends "auto" tries for tensors on `device_type`, fastest first.

    The executor is slower than anything: what it emulates is among them only on request.
    """
    emulated = emulation.current()
    fastest_first = ("triton", "cuda", "cpu", "reference")
    return tuple(
        name
        for name in fastest_first
        if BACKENDS[name].accepts(device_type)
        and BACKENDS[name].why_unavailable() is None
        and not (BACKENDS[name].emulated and emulated is not None and not emulated.auto)
    )
