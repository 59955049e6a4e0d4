"""Every operation as PyTorch sees it: schema, fake, gradients, `torch.compile`, `torch.export`."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
import torch._inductor.config
from support.operands import SMALL, case_id, operator, small, with_gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from evsam_kernels import ops
from evsam_kernels.numerics.budget import call, named_tensors
from evsam_kernels.numerics.cases import CASES, Case, Operands, map_operands
from evsam_kernels.ops.registry import OPERATIONS

QUICK = [case for op in OPERATIONS for case in CASES[op] if case.quick]
each_small_case = pytest.mark.parametrize("case", SMALL, ids=case_id)
each_operation = pytest.mark.parametrize("op", OPERATIONS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def with_all_gradients(function, operands: Operands) -> list[Tensor]:
    """The output of `function(operands)` and the gradients of all its tensors."""
    operands, leaves = with_gradients(operands)
    output = function(operands)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


@each_small_case
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_opcheck(case, backend, dtype):
    operands, _ = with_gradients(case.operands(dtype))
    torch.library.opcheck(operator(case.op), (*operands.values(), backend))


def test_opcheck_of_operands_of_two_dtypes():
    case = Case("layer_norm_2d", "mixed", {"channels": 4, "float32_affine": True})
    operands, _ = with_gradients(case.operands(torch.float16))
    torch.library.opcheck(operator(case.op), (*operands.values(), "auto"))


def test_opcheck_of_operands_without_gradients_and_of_an_empty_batch():
    for batch in (0, 2):
        operands = Case("conv_act", "batch", {"batch": batch}).operands(torch.float32)
        torch.library.opcheck(operator("conv_act"), (*operands.values(), "auto"))


@pytest.mark.parametrize("case", QUICK, ids=case_id)
def test_fake_result_is_like_the_real_one(case):
    operands = case.operands(torch.bfloat16)
    real = call(case.op, operands, "auto")
    fake = call(case.op, map_operands(lambda tensor: tensor.to("meta"), operands), "auto")
    assert fake.device.type == "meta"
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@each_small_case
def test_gradcheck(case):
    operands = case.operands(torch.float64)

    def of_tensors(*tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        return call(case.op, map_operands(lambda _: next(remaining), operands), "auto")

    leaves = [tensor.requires_grad_() for tensor in named_tensors(operands).values()]
    assert torch.autograd.gradcheck(of_tensors, leaves)


@each_small_case
def test_compiled_equals_eager(case):
    operands = case.operands(torch.float32)
    compiled = torch.compile(
        lambda operands: call(case.op, operands, "auto"), backend="aot_eager", fullgraph=True
    )
    assert_equal(
        with_all_gradients(compiled, operands),
        with_all_gradients(lambda operands: call(case.op, operands, "auto"), operands),
    )


@each_operation
def test_compiled_gradients_of_one_operand(op):
    compiled = torch.compile(
        lambda operands: call(op, operands, "auto"), backend="aot_eager", fullgraph=True
    )
    operands, leaves = with_gradients(small(op))
    for leaf in leaves[:-1]:
        leaf.requires_grad_(False)
    call(op, operands, "auto").square().sum().backward()
    expected, leaves[-1].grad = leaves[-1].grad, None
    compiled(operands).square().sum().backward()
    assert torch.equal(leaves[-1].grad, expected)
    assert all(leaf.grad is None for leaf in leaves[:-1])


# Its caches on disk know an operator by name: those of another version of this package would do.
@torch._inductor.config.patch(force_disable_caches=True)
def test_all_operations_in_one_graph_of_inductor():
    def total(all_operands: dict[str, Operands]) -> Tensor:
        return sum(call(op, operands, "auto").sin().sum() for op, operands in all_operands.items())

    leaves, all_operands = [], {}
    for op in OPERATIONS:
        all_operands[op], found = with_gradients(small(op))
        leaves += found
    expected = torch.autograd.grad(total(all_operands), leaves)
    compiled = torch.compile(total, fullgraph=True)
    torch.testing.assert_close(compiled(all_operands), total(all_operands))
    found = torch.autograd.grad(compiled(all_operands), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# Settings that keep every other operand's shape independent of the map's.
_OF_ANY_SIZE = {op: {"residual": False} for op in OPERATIONS[:3]}
_OF_ANY_SIZE["multi_scale_attention"] = {"residual": False}


def of_size(op: str, batch: int, height: int, width: int) -> Operands:
    """Operands that differ only in the size of the map; for one of `upsample_add`'s maps."""
    settings = {"batch": batch, **_OF_ANY_SIZE.get(op, {})}
    if op == "upsample_add":
        settings |= {"inputs": ((3, 4), (height, width)), "size": (6, 7)}
    else:
        settings |= {"size": (height, width)}
    return Case(op, "dynamic", settings).operands(torch.float32)


@each_operation
def test_one_dynamic_graph_serves_all_sizes(op):
    counter = CompileCounterWithBackend("aot_eager")

    def run(operands: Operands) -> Tensor:
        return call(op, operands, "auto")

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for size in ((2, 7, 9), (3, 6, 5), (4, 9, 8)):
        operands = of_size(op, *size)
        assert_equal(with_all_gradients(compiled, operands), with_all_gradients(run, operands))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_settings_are_arguments_of_a_dynamic_graph():
    x, weight = torch.randn(2, 6, 9, 8), torch.randn(6, 2, 3, 3)

    def convolve(stride: int, dilation: int, groups: int, activation: str | None) -> Tensor:
        return ops.conv_act(
            x,
            weight[:, : 6 // groups],
            stride=stride,
            dilation=dilation,
            groups=groups,
            activation=activation,
        )

    compiled = torch.compile(convolve, backend="aot_eager", fullgraph=True, dynamic=True)
    for settings in ((1, 1, 3, None), (2, 1, 3, "gelu"), (3, 2, 6, "relu"), (2, 3, 3, "silu")):
        assert torch.equal(compiled(*settings), convolve(*settings))

    def normalise(eps: float) -> Tensor:
        return ops.layer_norm_2d(x, eps=eps)

    compiled = torch.compile(normalise, backend="aot_eager", fullgraph=True, dynamic=True)
    for eps in (1e-5, 1e-3, 0.0):
        assert torch.equal(compiled(eps), normalise(eps))


def test_the_size_of_upsample_add_may_be_symbolic():
    def double(x: Tensor) -> Tensor:
        return ops.upsample_add([x], (2 * x.shape[2], 2 * x.shape[3]))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(double, backend=counter, fullgraph=True, dynamic=True)
    for size in ((2, 3, 4, 5), (3, 3, 6, 4), (4, 3, 5, 7)):
        x = torch.randn(size, requires_grad=True)
        assert torch.equal(compiled(x), double(x))
        (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(double(x).square().sum(), x)
        assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


class CallsWith(nn.Module):
    """A module that calls an operation, its map being the input and the rest its own."""

    def __init__(self, op: str, operands: Operands) -> None:
        super().__init__()
        self.op = op
        self.operands = operands

    def forward(self, x: Tensor) -> Tensor:
        name = next(iter(self.operands))
        # upsample_add adds a map to itself.
        given = [x, x] if name == "maps" else x
        return call(self.op, {**self.operands, name: given}, "auto")


@each_operation
def test_export(op):
    operands = of_size(op, 2, 7, 9)
    module = CallsWith(op, operands)
    x = next(reversed(named_tensors({"x": next(iter(operands.values()))}).values()))
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [operator(op)]

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about its archive.
        torch.export.save(exported, file)
        file.seek(0)
        loaded = torch.export.load(file)
    for y in (x, torch.randn(3, x.shape[1], 6, 5)):
        assert torch.equal(loaded.module()(y), module(y))
