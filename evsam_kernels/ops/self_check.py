"""Holds the first call of every kernel on a GPU against the formula in float64.

Kernels are tested in an executor; what a driver makes of them, and a GPU, is seen here for the
first time. A check computes the formula twice, at float64 and at the storage dtype, and waits for
the GPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

VARIABLE = "EVSAM_SELF_CHECK"
CHECKED_BACKENDS = ("triton", "cuda")

_lock = threading.Lock()
_findings: dict[tuple[Any, ...], str] = {}
_broken: set[tuple[str, str, torch.dtype]] = set()


class SelfCheckError(RuntimeError):
    """A kernel computes something wrong on this GPU; the message names it."""


def applies(backend: str, tensor: Tensor) -> bool:
    """Whether what `backend` makes of `tensor` is to be checked.

    Raises:
        ValueError: EVSAM_SELF_CHECK is neither 0 nor 1.
    """
    if backend not in CHECKED_BACKENDS or not _on_gpu(tensor):
        return False
    setting = os.environ.get(VARIABLE, "1")
    if setting not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {setting!r}")
    return setting == "1" and not _is_capturing(tensor)


def is_broken(op: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether a check has found a kernel of `op` to be wrong."""
    return (op, backend, dtype) in _broken


def forget() -> None:
    """Check every kernel anew."""
    with _lock:
        _findings.clear()
        _broken.clear()


def finding(
    op: str,
    backend: str,
    operands: Sequence[Any],
    tensors: Sequence[Tensor],
    result: Tensor,
    at: Callable[[torch.dtype], Tensor],
) -> str:
    """What is wrong with `result`, found out once for every layer shape; "" where it is right.

    Kernel and tile depend on dtype, device, shapes and settings. A call that a CUDA graph captures
    cannot be checked, as nothing has run yet: the next one is.

    Args:
        op: name of the operation.
        backend: the one that ran it.
        operands: of the call.
        tensors: those among them; the first is the input.
        result: what the backend made of them.
        at: computes the operation's formula from them at a dtype.
    """
    first = tensors[0]
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    settings = tuple(value for value in operands if isinstance(value, (int, float, str)))
    key = (op, backend, first.dtype, first.device, shapes, settings)
    if key not in _findings:
        with _lock:
            if key not in _findings:
                problem = _problem(result, at) if result.numel() else ""
                if problem:
                    problem = (
                        f"the {backend} kernel of {op} at {first.dtype}, input "
                        f"{list(first.shape)}, is wrong on {first.device}: {problem}; report this, "
                        f"and choose backend='reference' meanwhile ({VARIABLE}=0 runs it unchecked)"
                    )
                    _broken.add((op, backend, first.dtype))
                _findings[key] = problem
    return _findings[key]


def _problem(result: Tensor, at: Callable[[torch.dtype], Tensor]) -> str:
    """Why `result` is outside the error budget of `evsam_kernels.numerics`; "" where it is not."""
    dtype = result.dtype
    oracle = at(torch.float64)
    # Where the exact result does not fit the dtype, or operands were not finite, nothing is asked.
    fits = oracle.to(dtype).isfinite()
    oracle = oracle.where(fits, 0)
    difference = (result.double() - oracle).where(fits, 0)
    if not difference.isfinite().all():
        return "it has values that are inf or NaN where float64 has none"
    plain = at(dtype)
    if not plain.where(fits, 0).isfinite().all():
        # Plain PyTorch overflows, and is no measure.
        plain = at(torch.float32).to(dtype)
    yardsticks = [(plain.double() - oracle).where(fits, 0)]
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        # Kernels may round operands to TF32, three bits more than bfloat16, where PyTorch may choose
        # not to.
        yardsticks.append((at(torch.bfloat16).double() - oracle).where(fits, 0) / 8)
    for norm, name in ((_frobenius, "Frobenius norm"), (_maximum, "maximum")):
        error, allowed = norm(difference), 2 * max(map(norm, yardsticks))
        allowed += torch.finfo(dtype).eps / 2 * norm(oracle)
        if not error <= allowed:
            return f"the {name} of its error is {error:.3g}, {allowed:.3g} is allowed"
    return ""


def _frobenius(tensor: Tensor) -> float:
    return tensor.norm().item()


def _maximum(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
