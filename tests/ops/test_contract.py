"""What operations promise beside their numbers: memory, layout, autocast, threads, gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.buffers import guarded_inputs, guarded_outputs, nan_filled_memory
from support.operands import BACKENDS, SMALL, case_id, small, with_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evsam_kernels.numerics.budget import (
    assert_within_budget,
    call,
    evaluate,
    expect,
    judge,
    named_tensors,
)
from evsam_kernels.numerics.cases import CASES, Case, map_operands
from evsam_kernels.numerics.validation import available_backends
from evsam_kernels.ops import registry
from evsam_kernels.ops.layout import channels_last_strides
from evsam_kernels.ops.registry import OPERATIONS

QUICK = [case for op in OPERATIONS for case in CASES[op] if case.quick]
each_backend = pytest.mark.parametrize(("op", "backend"), BACKENDS)


@pytest.mark.parametrize("case", [*QUICK, *SMALL], ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_memory_and_layout(case, dtype, monkeypatch):
    """Reads only its operands, writes only its output, which is new and in exact NHWC strides."""
    operands = case.operands(dtype)
    expected = expect(case.op, operands)
    for backend in available_backends(case.op, "cpu"):
        with (
            nan_filled_memory(),
            guarded_outputs(monkeypatch),
            guarded_inputs(operands) as guarded,
        ):
            inputs = {
                tensor.untyped_storage().data_ptr() for tensor in named_tensors(guarded).values()
            }
            output = call(case.op, guarded, backend)
            assert output.untyped_storage().data_ptr() not in inputs
            assert output.dtype == dtype
            assert output.stride() == channels_last_strides(output.shape)
            (row,) = judge(case.op, case.name, backend, guarded, expected)
            assert row.passed, str(row)


@pytest.mark.parametrize(
    ("op", "backend"), [pair for pair in BACKENDS if pair[1] not in ("auto", "reference")]
)
def test_the_output_of_a_kernel_is_one_that_the_test_above_guards(op, backend, monkeypatch):
    with guarded_outputs(monkeypatch) as guards:
        output = call(op, small(op), backend)
    assert output.data_ptr() in [guard.tensor.data_ptr() for guard in guards]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def transposed(tensor: Tensor) -> Tensor:
    backwards = tuple(reversed(range(tensor.dim())))
    return tensor.permute(backwards).contiguous().permute(backwards)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def every_second_of(tensor: Tensor) -> Tensor:
    """Values between NaN, in every dimension."""
    larger = tensor.new_full([2 * length for length in tensor.shape], float("nan"))
    view = larger[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def inside_channels_last(tensor: Tensor) -> Tensor:
    """A part of a map that is dense in NHWC; a vector's part of a longer vector."""
    larger = tensor.new_full([length + 3 for length in tensor.shape], float("nan"))
    if tensor.dim() == 4:
        larger = larger.contiguous(memory_format=torch.channels_last)
    return larger[tuple(slice(1, -2) for _ in tensor.shape)].copy_(tensor)


@each_backend
@pytest.mark.parametrize(
    "view", [contiguous, transposed, expanded, every_second_of, inside_channels_last]
)
def test_operands_may_have_any_strides(op, backend, view):
    settings = {"channels": 6, "size": (5, 7)} if op == "layer_norm_2d" else {}
    operands = map_operands(view, Case(op, "views", settings).operands(torch.float32))
    output = call(op, operands, backend)
    assert output.stride() == channels_last_strides(output.shape)
    assert_within_budget(op, operands, backend, gradients=True)


@each_backend
def test_an_empty_batch(op, backend):
    operands, leaves = with_gradients(Case(op, "empty", {"batch": 0}).operands(torch.float32))
    output = call(op, operands, backend)
    of_two = call(op, Case(op, "two", {"batch": 2}).operands(torch.float32), backend)
    assert output.shape == (0, *of_two.shape[1:])
    assert output.dtype == torch.float32
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.count_nonzero()


@each_backend
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_changes_nothing(op, backend, low):
    operands = small(op)
    plain = evaluate(lambda **given: call(op, given, backend), operands, gradients=True)
    with torch.autocast("cpu", low):
        cast = evaluate(lambda **given: call(op, given, backend), operands, gradients=True)
    for quantity, value in plain.items():
        assert cast[quantity].dtype == torch.float32
        assert torch.equal(cast[quantity], value), quantity


@each_backend
def test_calls_from_several_threads(op, backend):
    cases = [Case(op, f"thread {index}", {}) for index in range(4)]
    operands = [case.operands(torch.float32) for case in cases]

    def run(index: int) -> Tensor:
        return call(op, operands[index % len(operands)], backend)

    alone = [run(index) for index in range(len(operands))]
    with ThreadPoolExecutor(max_workers=4) as pool:
        together = list(pool.map(run, range(6 * len(operands))))
    for index, result in enumerate(together):
        assert torch.equal(result, alone[index % len(operands)]), index


@each_backend
def test_only_operands_that_require_gradients_get_them(op, backend):
    operands, leaves = with_gradients(small(op))
    call(op, operands, backend).square().sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    for wanted, leaf in enumerate(leaves):
        for index, other in enumerate(leaves):
            other.requires_grad_(index == wanted)
            other.grad = None
        call(op, operands, backend).square().sum().backward()
        torch.testing.assert_close(leaf.grad, gradients[wanted])
        assert all(other.grad is None for other in leaves if other is not leaf)


@pytest.mark.parametrize("op", OPERATIONS)
def test_only_gradients_that_are_required_are_computed(op, monkeypatch):
    asked_for = []
    compute = registry._gradients

    def spy(reference, grad, wanted, operands):
        asked_for.append(list(wanted))
        return compute(reference, grad, wanted, operands)

    monkeypatch.setattr(registry, "_gradients", spy)
    operands, leaves = with_gradients(small(op))
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    call(op, operands, "auto").sum().backward()
    assert asked_for == [[True] + [False] * (len(leaves) - 1)]


@each_backend
def test_gradients_with_activation_checkpoints_and_offloading(op, backend):
    operands, leaves = with_gradients(small(op))

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.square().sum(), leaves)

    expected = gradients(call(op, operands, backend))
    with torch.autograd.graph.save_on_cpu():
        offloaded = call(op, operands, backend)
    checkpointed = checkpoint(lambda: call(op, operands, backend), use_reentrant=False)
    for output in (offloaded, checkpointed):
        for ours, theirs in zip(gradients(output), expected, strict=True):
            assert torch.equal(ours, theirs)


@each_backend
def test_an_operand_changed_in_place_is_noticed_by_the_backward_pass(op, backend):
    operands, _ = with_gradients(small(op))
    first = next(iter(named_tensors(operands).values()))
    output = call(op, operands, backend)
    with torch.no_grad():
        first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_backend
def test_negated_views_and_inference_mode(op, backend):
    operands = small(op)
    expected = call(op, operands, backend)

    def negated_view(tensor: Tensor) -> Tensor:
        view = torch.complex(tensor, -tensor).conj().imag
        assert view.is_neg()
        return view

    assert torch.equal(call(op, map_operands(negated_view, operands), backend), expected)
    with torch.inference_mode():
        assert torch.equal(call(op, operands, backend), expected)


@each_backend
def test_no_gradients_without_need(op, backend):
    operands, leaves = with_gradients(small(op))
    with torch.no_grad():
        assert not call(op, operands, backend).requires_grad
    for leaf in leaves:
        leaf.requires_grad_(False)
    assert not call(op, operands, backend).requires_grad


@each_backend
def test_gradients_have_the_dtype_and_shape_of_their_operand(op, backend):
    """Contiguous, as the fake implementation says, whatever the strides of what is fed back."""
    operands, leaves = with_gradients(small(op, torch.bfloat16))
    output = call(op, operands, backend)
    for fed_back in (torch.ones(()).bfloat16().expand_as(output), torch.ones_like(output)):
        found = torch.autograd.grad(output, leaves, fed_back, retain_graph=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            assert gradient.dtype == torch.bfloat16
            assert gradient.shape == leaf.shape
            assert gradient.is_contiguous()
