"""How far a kernel may be from the float64 result: twice as far as plain PyTorch, and one rounding.

A backend passes where `error(backend) <= 2 * error(plain) + unit roundoff` for the relative
Frobenius and the maximum error. `plain` is the operation's formula at the storage dtype; both are
measured against the formula at float64, from operands rounded to the storage dtype first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from evsam_kernels import ops
from evsam_kernels.numerics.cases import Operands, map_operands
from evsam_kernels.ops.registry import formula


@dataclass(frozen=True)
class Errors:
    """Distance of a result from the oracle, both relative.

    Attributes:
        frobenius: Frobenius norm of the difference over that of the oracle.
        maximum: largest difference over the oracle's largest value.
    """

    frobenius: float
    maximum: float

    def __str__(self) -> str:
        return f"Frobenius {self.frobenius:.2e}, maximum {self.maximum:.2e}"

    def within(self, limit: Errors) -> bool:
        """Whether neither error exceeds its limit."""
        return self.frobenius <= limit.frobenius and self.maximum <= limit.maximum

    def ratio(self, limit: Errors) -> float:
        """The larger of both errors over their limits."""
        norm = self.closer_norm(limit)
        return getattr(self, norm) / getattr(limit, norm)

    def closer_norm(self, limit: Errors) -> str:
        """Say "frobenius" or "maximum", whichever comes closer to its limit."""
        maximum_is = self.maximum / limit.maximum >= self.frobenius / limit.frobenius
        return "maximum" if maximum_is else "frobenius"


WORTHLESS = Errors(math.inf, math.inf)
"""The errors of a result with inf or NaN, or of none."""
_ZEROS = Errors(1.0, 1.0)
"""The errors of a result of zeros."""


def measure(actual: Tensor, oracle: Tensor) -> Errors:
    """Errors of `actual` against the float64 `oracle`, a non-zero tensor of the same shape.

    Infinite where `actual` holds inf or NaN.
    """
    if not actual.isfinite().all():
        return WORTHLESS
    difference = actual.double() - oracle
    return Errors(
        (difference.norm() / oracle.norm()).item(),
        (difference.abs().max() / oracle.abs().max()).item(),
    )


def budget(plain: Errors, dtype: torch.dtype) -> Errors:
    """The errors allowed at the storage dtype `dtype` where plain PyTorch has errors `plain`."""
    unit_roundoff = torch.finfo(dtype).eps / 2
    return Errors(2 * plain.frobenius + unit_roundoff, 2 * plain.maximum + unit_roundoff)


@dataclass(frozen=True)
class Expectation:
    """What one result of an operation must be, and how well plain PyTorch meets that.

    Attributes:
        oracle: the result at float64.
        dtype: the storage dtype of the result.
        plain: errors of plain PyTorch.
        yardstick: which plain computation that was; "" where none is of use.
    """

    oracle: Tensor
    dtype: torch.dtype
    plain: Errors
    yardstick: str

    @property
    def budget(self) -> Errors:
        return budget(self.plain, self.dtype)


@dataclass(frozen=True)
class Row:
    """How one result of one backend compares.

    Attributes:
        op, case, backend, dtype: what was computed; the dtype is that of the operands.
        quantity: "output" or "gradient of <operand>".
        shape: of the result.
        ours: the backend's errors.
        plain: plain PyTorch's errors.
        budget: the errors allowed.
        yardstick: which plain computation that was.
        failure: why the row fails; "" where it passes.
    """

    op: str
    case: str
    backend: str
    dtype: str
    quantity: str
    shape: tuple[int, ...]
    ours: Errors
    plain: Errors
    budget: Errors
    yardstick: str
    failure: str

    @property
    def passed(self) -> bool:
        return not self.failure

    @property
    def ratio(self) -> float:
        """Error over budget, the worse of both norms; NaN where there is no budget."""
        return self.ours.ratio(self.budget)

    def __str__(self) -> str:
        return (
            f"{self.op} on {self.backend}, {self.dtype}, {self.case}, {self.quantity} "
            f"{list(self.shape)}: {self.failure or 'passes'}\n"
            f"  ours:   {self.ours}\n"
            f"  plain:  {self.plain} ({self.yardstick or 'no yardstick'})\n"
            f"  budget: {self.budget}"
        )


def call(op: str, operands: Operands, backend: str) -> Tensor:
    """Call the public function of `op` with operands named as in its schema."""
    arguments = dict(operands)
    if op == "upsample_add":
        arguments["size"] = (arguments.pop("height"), arguments.pop("width"))
    return getattr(ops, op)(**arguments, backend=backend)


def named_tensors(operands: Operands) -> dict[str, Tensor]:
    """The tensors among the operands, those of a list as "name[index]"."""
    named = {}
    for name, value in operands.items():
        if isinstance(value, Tensor):
            named[name] = value
        elif isinstance(value, list):
            named.update({f"{name}[{index}]": tensor for index, tensor in enumerate(value)})
    return named


def evaluate(
    function: Callable[..., Tensor], operands: Operands, gradients: bool
) -> dict[str, Tensor]:
    """Results of `function(**operands)` by quantity: "output" and each "gradient of <operand>".

    What is fed back for the gradients is the same whatever computes, and exact at every dtype.
    """
    if not gradients:
        with torch.no_grad():
            return {"output": function(**operands)}
    leaves = map_operands(lambda value: value.detach().requires_grad_(), operands)
    tensors = named_tensors(leaves)
    output = function(**leaves)
    # Few bits, so that it is the same at every dtype; not so few that sums of it are exact.
    generator = torch.Generator().manual_seed(0)
    fed_back = torch.randn(output.shape, generator=generator).bfloat16().to(output)
    found = torch.autograd.grad(output, list(tensors.values()), fed_back)
    return {
        "output": output.detach(),
        **{f"gradient of {name}": value for name, value in zip(tensors, found, strict=True)},
    }


class _OverflowWatch(TorchFunctionMode):
    """Notices inf and NaN in any intermediate result of a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.overflowed = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.overflowed |= not bool(result.isfinite().all())
        return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch from starting threads, which float16 and float64 convolutions do per group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cast(operands: Operands, dtype: torch.dtype) -> Operands:
    return map_operands(lambda value: value.to(dtype), operands)


def _compare(result: Tensor, oracle: Tensor, dtype: torch.dtype) -> Errors:
    """Errors of `result` rounded to `dtype`, where the oracle fits that."""
    if result.shape != oracle.shape:
        return WORTHLESS
    fits = oracle.to(dtype).isfinite()
    return measure(result.to(dtype)[fits], oracle[fits])


def expect(op: str, operands: Operands, *, gradients: bool = False) -> dict[str, Expectation]:
    """What every quantity of `op` (see `evaluate`) must be.

    The yardstick is the formula at the storage dtype. Where that is of no use, float32 rounded to
    the storage dtype takes its place, which is stricter: where float16 or bfloat16 overflows on the
    way, and where the budget would let zeros pass. Nothing measures float64; its error is taken to
    be that of float32, scaled by the ratio of their unit roundoffs.

    Args:
        op: name of the operation.
        operands: at the storage dtype, by the names in the operation's schema.
        gradients: whether to expect gradients too.
    """
    dtypes = {
        "output": _first(operands).dtype,
        **{f"gradient of {name}": value.dtype for name, value in named_tensors(operands).items()},
    }
    with torch.autocast(_first(operands).device.type, enabled=False):
        with one_thread():
            oracles = evaluate(formula(op), _cast(operands, torch.float64), gradients)
        found: dict[str, tuple[Errors, str]] = {}
        for yardstick, errors in _yardsticks(op, operands, oracles, dtypes, gradients):
            for quantity, value in errors.items():
                if quantity not in found and budget(value, dtypes[quantity]).within(_ZEROS):
                    found[quantity] = (value, yardstick)
            if len(found) == len(oracles):
                break
    return {
        quantity: Expectation(oracle, dtypes[quantity], *found.get(quantity, (WORTHLESS, "")))
        for quantity, oracle in oracles.items()
    }


def _first(operands: Operands) -> Tensor:
    return next(iter(named_tensors(operands).values()))


def _yardsticks(
    op: str,
    operands: Operands,
    oracles: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    gradients: bool,
) -> Iterator[tuple[str, dict[str, Errors]]]:
    """Plain computations and their errors, the preferred one first."""

    def errors(results: dict[str, Tensor], oracles: dict[str, Tensor]) -> dict[str, Errors]:
        return {
            quantity: _compare(result, oracles[quantity], dtypes[quantity])
            for quantity, result in results.items()
        }

    storage = _first(operands).dtype
    name = str(storage).removeprefix("torch.")
    if storage == torch.float64:
        narrow = _cast(operands, torch.float32)
        scaled = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        found = errors(
            evaluate(formula(op), narrow, gradients),
            evaluate(formula(op), _cast(narrow, torch.float64), gradients),
        )
        yield (
            "float32, scaled to float64",
            {
                quantity: Errors(scaled * value.frobenius, scaled * value.maximum)
                for quantity, value in found.items()
            },
        )
        return
    # At float32 the number of threads decides on the order of sums, so that it must be the user's.
    with _OverflowWatch() as watch, nullcontext() if storage == torch.float32 else one_thread():
        results = evaluate(formula(op), operands, gradients)
    if not watch.overflowed:
        yield name, errors(results, oracles)
    if storage != torch.float32:
        results = evaluate(formula(op), _cast(operands, torch.float32), gradients)
        yield f"float32 rounded to {name}", errors(results, oracles)


def judge(
    op: str, case: str, backend: str, operands: Operands, expected: dict[str, Expectation]
) -> list[Row]:
    """Run `op` on one backend and hold every expected quantity against its budget."""
    actual = evaluate(lambda **given: call(op, given, backend), operands, len(expected) > 1)
    dtype = _first(operands).dtype
    return [
        compare(actual[quantity], expectation, op, case, backend, dtype, quantity)
        for quantity, expectation in expected.items()
    ]


def compare(
    actual: Tensor,
    expected: Expectation,
    op: str,
    case: str,
    backend: str,
    dtype: torch.dtype,
    quantity: str,
) -> Row:
    """Hold a result against what was expected; see `Row` for what is only noted."""
    return Row(
        op=op,
        case=case,
        backend=backend,
        dtype=str(dtype).removeprefix("torch."),
        quantity=quantity,
        shape=tuple(expected.oracle.shape),
        ours=_compare(actual, expected.oracle, expected.dtype),
        plain=expected.plain,
        budget=expected.budget,
        yardstick=expected.yardstick,
        failure=_failure(actual, expected),
    )


def _failure(actual: Tensor, expected: Expectation) -> str:
    """Why `actual` is not what was expected; "" where it is."""
    oracle, dtype = expected.oracle, expected.dtype
    if actual.dtype != dtype or actual.shape != oracle.shape:
        return f"it is {actual.dtype} {list(actual.shape)}, expected {dtype} {list(oracle.shape)}"
    fits = oracle.to(dtype).isfinite()
    if not oracle.isfinite().all() or not oracle.to(dtype)[fits].count_nonzero():
        return f"the case shows nothing: the float64 result is zero or does not fit {dtype}"
    if not expected.yardstick:
        return "the case shows nothing: plain PyTorch is as far from the float64 result as zeros"
    broken = int((~actual[fits].isfinite()).sum())
    if broken:
        return f"{broken} of {actual.numel()} values are inf or NaN"
    errors = _compare(actual, oracle, dtype)
    if not errors.within(expected.budget):
        return f"the error is {errors.ratio(expected.budget):.3g} times the budget"
    return ""


def check(op: str, operands: Operands, backend: str, *, gradients: bool = False) -> list[Row]:
    """Hold one call of `op` on `backend`, and its gradients, against the error budget.

    Args:
        op: name of the operation.
        operands: at the storage dtype, by the names in the operation's schema.
        backend: "auto", or the name of a backend.
        gradients: whether to check the gradients of all tensors too.
    """
    return judge(op, "", backend, operands, expect(op, operands, gradients=gradients))


def assert_within_budget(
    op: str, operands: Operands, backend: str, *, gradients: bool = False
) -> None:
    """Raise AssertionError, with all figures, unless every row of `check` passes."""
    failed = [row for row in check(op, operands, backend, gradients=gradients) if not row.passed]
    if failed:
        raise AssertionError("\n".join(map(str, failed)))
