"""Registers operations with `torch.library` and finds the kernel that runs a call.

An operation is one formula (`ops/<op>/reference.py`), one shape function that also checks the
arguments, and any number of kernels (`ops/<op>/<backend>.py`). Schema, fake, autograd and choice of
backend follow from these and are the same for every operation, so they live here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evsam_kernels import backends
from evsam_kernels.ops import choice, self_check
from evsam_kernels.ops.choice import Layer
from evsam_kernels.ops.layout import accumulation_dtype, channels_last, empty_channels_last
from evsam_kernels.simt import emulation

NAMESPACE = "evsam"
OPERATIONS = (
    "conv_act",
    "fused_mbconv",
    "mbconv",
    "relu_linear_attention",
    "multi_scale_attention",
    "layer_norm_2d",
    "upsample_add",
)

Kernel = Callable[..., Tensor]


def has_kernel(op: str, backend: str, dtype: torch.dtype | None = None) -> bool:
    """Whether `backend` has a kernel for `op`, at `dtype` where given, whether or not it runs."""
    if importlib.util.find_spec(f"evsam_kernels.ops.{op}.{backend}") is None:
        return False
    return backend == "reference" or dtype is None or dtype in _kernel_file(op, backend).DTYPES


def _kernel_file(op: str, backend: str) -> Any:
    """A backend's kernel of `op`: a function of that name, and DTYPES, what it takes as input."""
    return importlib.import_module(f"evsam_kernels.ops.{op}.{backend}")


@functools.cache
def formula(op: str) -> Kernel:
    """The operation's readable PyTorch formula, computed at the dtype of its arguments."""
    return getattr(importlib.import_module(f"evsam_kernels.ops.{op}.reference"), op)


def chosen_backend(
    op: str, backend: str, device_type: str, dtype: torch.dtype, layer: Layer | None = None
) -> str:
    """The name of the backend that runs `op` on `device_type` when `backend` is asked for.

    Args:
        op: name of the operation.
        backend: "auto", or the name of a backend.
        device_type: of the tensors.
        dtype: of the input.
        layer: what "auto" on a GPU chooses by; None for no layer in particular.

    Raises:
        ValueError: unknown backend, or one that does not run on such a device.
        BackendUnavailableError: the named backend cannot run here or has no kernel for `op` at
            `dtype`.
    """
    if backend == backends.AUTO:
        order = backends.auto_order(device_type)
        if "cuda" in order and layer is not None and choice.prefers_cuda(op, layer):
            order = ("cuda", *order)
        name = next(name for name in order if has_kernel(op, name, dtype))
        return "reference" if self_check.is_broken(op, name, dtype) else name
    backends.require(backend, device_type)
    if not has_kernel(op, backend, dtype):
        having = [
            name
            for name, other in backends.BACKENDS.items()
            if other.why_unavailable() is None and has_kernel(op, name, dtype)
        ]
        raise backends.BackendUnavailableError(
            f"backend {backend!r} has no kernel for {op} at {dtype}; it runs on "
            f"{', '.join(having)}; choose one of these or backend='auto'"
        )
    return backend


class Implementation(NamedTuple):
    """What runs a call.

    Attributes:
        backend: its name.
        function: takes the operands.
    """

    backend: str
    function: Kernel


@functools.cache
def implementation(
    op: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    layer: Layer | None = None,
    emulated: bool | None = None,
) -> Implementation:
    """What runs `op`; see `chosen_backend` for the arguments and what it raises.

    The choice depends on whether an emulation is in force, too: `emulated` is what that is to do
    about "auto", and None without one.
    """
    name = chosen_backend(op, backend, device_type, dtype, layer)
    if name == "reference":
        return Implementation(name, functools.partial(_run_formula, formula(op)))
    return Implementation(name, getattr(_kernel_file(op, name), op))


def _backward_kernel(
    op: str, backend: str, device_type: str, dtype: torch.dtype
) -> Callable[..., list[Tensor]]:
    """The function that computes the gradients of `op`: the backend's own where it has one."""
    name = chosen_backend(op, backend, device_type, dtype)
    if name != "reference" and hasattr(_kernel_file(op, name), f"{op}_backward"):
        return getattr(_kernel_file(op, name), f"{op}_backward")
    return functools.partial(_gradients, formula(op))


def map_tensors(function: Callable[[Tensor], Any], argument: Any) -> Any:
    """Apply `function` to every tensor in `argument`, also inside lists; keep anything else."""
    if isinstance(argument, Tensor):
        return function(argument)
    if isinstance(argument, (list, tuple)):
        return [map_tensors(function, item) for item in argument]
    return argument


def tensors_of(operands: Sequence[Any]) -> list[Tensor]:
    """All tensors among `operands`, lists flattened, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, operands)
    return found


def _run_formula(reference: Kernel, *operands: Any) -> Tensor:
    """Run a formula at the accumulation dtype and round its result once to the storage dtype."""
    storage = tensors_of(operands)[0]
    wide = accumulation_dtype(storage.dtype)
    with torch.autocast(device_type=storage.device.type, enabled=False):
        result = reference(*map_tensors(lambda tensor: tensor.to(wide), operands))
    result = channels_last(result.to(storage.dtype))
    # An operator must not return one of its inputs.
    return result.clone() if any(result is tensor for tensor in tensors_of(operands)) else result


def _checked(
    op: str, asked_for: str, backend: str, operands: Sequence[Any], result: Tensor
) -> Tensor:
    """`result`, or that of the reference where a kernel that "auto" has chosen is found wrong.

    Raises:
        SelfCheckError: a kernel that was asked for by name is found wrong.
    """

    def at(dtype: torch.dtype) -> Tensor:
        with torch.no_grad(), torch.autocast(device_type=result.device.type, enabled=False):
            return formula(op)(*map_tensors(lambda tensor: tensor.to(dtype), operands))

    known = self_check.is_broken(op, backend, result.dtype)
    problem = self_check.finding(op, backend, operands, tensors_of(operands), result, at)
    if not problem:
        return result
    if asked_for != backends.AUTO:
        raise self_check.SelfCheckError(problem)
    if not known:
        warnings.warn(f"{problem}; the reference takes its place", stacklevel=3)
    implementation.cache_clear()
    return _run_formula(formula(op), *operands)


def _gradients(
    reference: Kernel, grad: Tensor, wanted: Sequence[bool], operands: Sequence[Any]
) -> list[Tensor]:
    """Gradients of a formula with respect to the wanted tensors, each at its operand's dtype."""
    tensors = tensors_of(operands)
    wide = accumulation_dtype(tensors[0].dtype)
    primals = [tensor.to(wide) for tensor in tensors]
    chosen = [index for index, want in enumerate(wanted) if want]

    def of_chosen(*values: Tensor) -> Tensor:
        substituted = list(primals)
        for index, value in zip(chosen, values, strict=True):
            substituted[index] = value
        remaining = iter(substituted)
        return reference(*map_tensors(lambda _: next(remaining), operands))

    with torch.autocast(device_type=grad.device.type, enabled=False):
        vjp = torch.func.vjp(of_chosen, *(primals[index] for index in chosen))[1]
        gradients = vjp(grad.to(wide))
    return [
        gradient.to(tensors[index].dtype).clone(memory_format=torch.contiguous_format)
        for index, gradient in zip(chosen, gradients, strict=True)
    ]


_operand_names: dict[str, list[str]] = {}


def layer_of(op: str, operands: Sequence[Any]) -> Layer | None:
    """What "auto" on a GPU chooses a backend by, of a call of `op`."""
    return choice.layer_of(op, dict(zip(_operand_names[op], operands, strict=True)))


def register(op: str, operands_schema: str, output_shape: Callable[..., Sequence[int]]) -> Kernel:
    """Register `op` with `torch.library` and return what calls the operator.

    The operator takes the operands of `operands_schema` and the backend's name, checks them, and
    returns a dense NHWC tensor with the dtype of the first tensor operand. Its gradient comes from
    the function `<op>_backward` beside the backend's kernel, called with the output's gradient,
    which gradients are wanted and the operands; where there is none, it is that of the formula.
    An export to ONNX, which knows no such operator, gets the formula.

    Args:
        op: name of the operation, of its folder and of its formula.
        operands_schema: the operands in `torch.library` schema syntax, tensors and settings.
        output_shape: called with the operands; checks them and returns the output's `[B, C, H, W]`.
    """
    qualified = f"{NAMESPACE}::{op}"
    torch.library.define(qualified, f"({operands_schema}, str backend) -> Tensor")
    torch.library.define(
        f"{qualified}_backward",
        f"(Tensor grad, bool[] wanted, {operands_schema}, str backend) -> Tensor[]",
    )
    operator = getattr(getattr(torch.ops, NAMESPACE), op).default
    backward_operator = getattr(getattr(torch.ops, NAMESPACE), f"{op}_backward").default

    kinds, names = zip(
        *(operand.split(" ") for operand in operands_schema.split(", ")), strict=True
    )
    _operand_names[op] = list(names)
    optional_lists = [index for index, kind in enumerate(kinds) if kind == "Tensor[]?"]

    def run(*arguments: Any) -> Tensor:
        *operands, backend = arguments
        for index in optional_lists:
            # AOTInductor hands an empty list over as None.
            if operands[index] is None:
                operands[index] = []
        output_shape(*operands)
        first = operands[0] if isinstance(operands[0], Tensor) else tensors_of(operands)[0]
        emulated = None if (current := emulation.current()) is None else current.auto
        layer = layer_of(op, operands) if first.is_cuda or emulated else None
        found = implementation(op, backend, first.device.type, first.dtype, layer, emulated)
        result = found.function(*operands)
        if self_check.applies(found.backend, first):
            return _checked(op, backend, found.backend, operands, result)
        return result

    def fake(*arguments: Any) -> Tensor:
        *operands, _ = arguments
        shape = output_shape(*operands)
        return empty_channels_last(tensors_of(operands)[0], shape)

    def run_backward(grad: Tensor, wanted: Sequence[bool], *arguments: Any) -> list[Tensor]:
        *operands, backend = arguments
        first = tensors_of(operands)[0]
        gradients = _backward_kernel(op, backend, first.device.type, first.dtype)
        return gradients(grad, wanted, operands)

    def fake_backward(grad: Tensor, wanted: Sequence[bool], *arguments: Any) -> list[Tensor]:
        *operands, _ = arguments
        return [
            tensor.new_empty(tensor.shape)
            for tensor, want in zip(tensors_of(operands), wanted, strict=True)
            if want
        ]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.backend = inputs
        ctx.save_for_backward(*tensors_of(operands))
        ctx.operands = map_tensors(lambda _: _SAVED, operands)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # Read once: activation checkpoints allow no more.
        saved = iter(tensors)
        operands = _map_saved(lambda: next(saved), ctx.operands)
        wanted = [tensor.requires_grad for tensor in tensors]
        gradients = iter(backward_operator(grad, wanted, *operands, ctx.backend))
        of_operands = iter([next(gradients) if want else None for want in wanted])
        return (*_map_saved(lambda: next(of_operands), ctx.operands, otherwise=None), None)

    torch.library.impl(qualified, "CompositeExplicitAutograd")(run)
    torch.library.impl(f"{qualified}_backward", "CompositeExplicitAutograd")(run_backward)
    torch.library.register_fake(qualified)(fake)
    torch.library.register_fake(f"{qualified}_backward")(fake_backward)
    torch.library.register_autograd(qualified, backward, setup_context=save)

    def call(*arguments: Any) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            *operands, _ = arguments
            output_shape(*operands)
            return _run_formula(formula(op), *operands)
        result: Tensor = operator(*arguments)
        return result

    return call


_SAVED = object()
"""Stands for a saved tensor among the operands kept for the backward pass."""

_AS_KEPT = object()


def _map_saved(produce: Callable[[], Any], operands: Any, otherwise: Any = _AS_KEPT) -> Any:
    """Replace every saved tensor's place by `produce()`, anything else by `otherwise` if given."""
    if operands is _SAVED:
        return produce()
    if isinstance(operands, list):
        return [_map_saved(produce, item, otherwise) for item in operands]
    return operands if otherwise is _AS_KEPT else otherwise
