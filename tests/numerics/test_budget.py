"""The budget rule: its arithmetic, its yardsticks, and that it catches wrong kernels."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import made_up_backend
from torch import Tensor

from evsam_kernels.numerics.budget import (
    Errors,
    assert_within_budget,
    budget,
    call,
    check,
    evaluate,
    expect,
    measure,
    named_tensors,
)
from evsam_kernels.numerics.cases import CASES, Case
from evsam_kernels.numerics.validation import plan, validate
from evsam_kernels.ops import registry
from evsam_kernels.ops.registry import OPERATIONS, formula, map_tensors

HALVES = (torch.float16, torch.bfloat16)


def test_errors_are_relative_to_the_oracle():
    oracle = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    errors = measure(torch.tensor([3.0, -4.0, 0.1]), oracle)
    assert errors.frobenius == pytest.approx(0.1 / 5)
    assert errors.maximum == pytest.approx(0.1 / 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_errors_of_what_is_not_finite_are_infinite(value):
    actual = torch.tensor([1.0, value])
    assert measure(actual, torch.ones(2, dtype=torch.float64)) == Errors(math.inf, math.inf)


def test_budget_is_twice_the_error_and_one_rounding():
    assert budget(Errors(0.25, 0.5), torch.float16) == Errors(0.5 + 2**-11, 1 + 2**-11)
    assert budget(Errors(0.0, 0.0), torch.bfloat16) == Errors(2**-8, 2**-8)
    assert budget(Errors(0.0, 0.0), torch.float32) == Errors(2**-24, 2**-24)


def test_either_norm_can_exceed_its_limit():
    limit = Errors(0.5, 0.25)
    assert Errors(0.5, 0.25).within(limit)
    assert not Errors(0.51, 0.0).within(limit)
    assert not Errors(0.0, 0.26).within(limit)
    assert not Errors(math.nan, 0.0).within(limit)
    assert Errors(0.25, 0.25).ratio(limit) == 1
    assert Errors(0.25, 0.25).closer_norm(limit) == "maximum"
    assert Errors(0.5, 0.0).closer_norm(limit) == "frobenius"


def test_names_of_tensors():
    operands = {"x": torch.ones(1), "maps": [torch.ones(2), torch.ones(3)], "eps": 0.1, "no": None}
    assert {name: len(value) for name, value in named_tensors(operands).items()} == {
        "x": 1,
        "maps[0]": 2,
        "maps[1]": 3,
    }


def test_gradients_feed_the_same_values_back_at_every_dtype():
    x = torch.randn(2, 3, 4, 4)
    found = [
        evaluate(lambda x: x * 1, {"x": x.to(dtype)}, gradients=True)["gradient of x"]
        for dtype in (torch.float64, torch.float32, *HALVES)
    ]
    assert found[0].count_nonzero()
    assert all(torch.equal(value.double(), found[0]) for value in found)


def rows_of(op: str, kernel, dtype: torch.dtype = torch.float32, **settings: object):
    with made_up_backend("other", **{op: kernel}):
        return check(op, Case(op, "budget test", settings).operands(dtype), "other")


def rounded(result: Tensor, like: Tensor) -> Tensor:
    return result.to(like.dtype).contiguous(memory_format=torch.channels_last)


def exact(op: str):
    """A kernel that computes at float64."""

    def kernel(*operands):
        first = registry.tensors_of(operands)[0]
        return rounded(formula(op)(*map_tensors(Tensor.double, operands)), first)

    return kernel


def at(op: str, dtype: torch.dtype):
    """A kernel that computes at `dtype`, whatever the storage dtype."""

    def kernel(*operands):
        first = registry.tensors_of(operands)[0]
        return rounded(formula(op)(*map_tensors(lambda t: t.to(dtype), operands)), first)

    return kernel


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_an_exact_kernel_passes(op, dtype):
    (row,) = rows_of(op, exact(op), dtype)
    assert row.passed, str(row)
    assert row.budget.frobenius > 0


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(
    ("storage", "computed"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_kernel_that_computes_with_too_few_bits_fails(op, storage, computed):
    (row,) = rows_of(op, at(op, computed), storage)
    assert "times the budget" in row.failure
    assert row.ratio > 1


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_formula_at_float16_fails_where_it_overflows(op):
    """What the cases are there to show; at bfloat16 the same kernel is the yardstick itself."""
    with made_up_backend("other", **{op: at(op, torch.float16)}):
        steps = plan([op], ["other"], ["float16"], quick=True)
        failed = [row for rows in validate(steps) for row in rows if not row.passed]
    assert any("large" in row.case or "overshoot" in row.case for row in failed)
    with made_up_backend("other", **{op: at(op, torch.bfloat16)}):
        steps = plan([op], ["other"], ["bfloat16"], quick=True)
        rows = [row for rows in validate(steps) for row in rows if row.quantity == "output"]
    assert all(row.passed or row.yardstick != "bfloat16" for row in rows)


def layer_norm(change):
    """An exact layer_norm_2d whose result or arguments are spoilt by `change`."""

    def kernel(x, weight, bias, eps):
        return rounded(change(formula("layer_norm_2d"), x.double(), weight, bias, eps), x)

    return kernel


def one_wrong_value(f, x, weight, bias, eps):
    y = f(x, weight, bias, eps)
    y[1, 2, 3, 4] += 1e-4
    return y


WRONG = {
    "zeros": lambda f, x, w, b, eps: torch.zeros_like(x),
    "one wrong value": one_wrong_value,
    "weight ignored": lambda f, x, w, b, eps: f(x, None, b, eps),
    "bias ignored": lambda f, x, w, b, eps: f(x, w, None, eps),
    "eps ignored": lambda f, x, w, b, eps: f(x, w, b, 0.0),
    "unbiased variance": lambda f, x, w, b, eps: f(x, w * (23 / 24) ** 0.5, b, eps),
    "pixels swapped": lambda f, x, w, b, eps: f(x, w, b, eps).flip(3),
    "batch repeated": lambda f, x, w, b, eps: f(x[:1], w, b, eps).expand_as(x),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_fails(wrong):
    (row,) = rows_of("layer_norm_2d", layer_norm(WRONG[wrong]))
    assert "times the budget" in row.failure


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_fails(value):
    def spoil(f, x, weight, bias, eps):
        y = f(x, weight, bias, eps)
        y[1, 2, 3, 4] = value
        return y

    (row,) = rows_of("layer_norm_2d", layer_norm(spoil))
    assert row.failure == f"1 of {2 * 24 * 7 * 9} values are inf or NaN"
    assert row.ours == Errors(math.inf, math.inf)


def test_wrong_dtype_and_shape_fail():
    (row,) = rows_of("layer_norm_2d", lambda x, *_: x.half(), torch.float32)
    assert "it is torch.float16" in row.failure
    (row,) = rows_of("layer_norm_2d", lambda x, *_: x[:, :, 1:] + 1, torch.float32)
    assert "expected torch.float32 [2, 24, 7, 9]" in row.failure


def test_wrong_gradients_fail(monkeypatch):
    gradients = registry._gradients
    monkeypatch.setattr(
        registry, "_gradients", lambda *given: [g * 1.001 for g in gradients(*given)]
    )
    operands = Case("layer_norm_2d", "gradients", {}).operands(torch.float32)
    rows = check("layer_norm_2d", operands, "reference", gradients=True)
    failed = [row.quantity for row in rows if not row.passed]
    assert failed == ["gradient of x", "gradient of weight", "gradient of bias"]


def test_zeros_show_nothing():
    operands = {"x": torch.zeros(1, 4, 2, 2), "weight": None, "bias": None, "eps": 1e-6}
    (row,) = check("layer_norm_2d", operands, "reference")
    assert row.failure.startswith("the case shows nothing: the float64 result is zero")
    assert math.isnan(row.ratio)


def test_values_beyond_the_dtype_may_be_infinite_and_no_others():
    x = torch.tensor([1.0, 60000.0]).half().view(1, 1, 1, 2)
    operands = Case("conv_act", "range", {"channels": (1, 1), "kernel": 1}).operands(torch.float16)
    operands |= {"x": x, "weight": torch.full((1, 1, 1, 1), 2.0).half(), "bias": None}
    (row,) = check("conv_act", operands, "reference")
    assert row.passed, str(row)
    assert call("conv_act", operands, "reference").isinf().sum() == 1
    with made_up_backend("other", conv_act=lambda x, *_: torch.full_like(x, math.inf)):
        (row,) = check("conv_act", operands, "other")
    assert row.failure == "1 of 2 values are inf or NaN"


def test_yardstick_at_the_storage_dtype():
    for dtype in (torch.float32, *HALVES):
        operands = Case("mbconv", "yardstick", {}).operands(dtype)
        expected = expect("mbconv", operands)["output"]
        plain = formula("mbconv")(**operands)
        assert expected.yardstick == str(dtype).removeprefix("torch.")
        assert vars(expected.plain) == pytest.approx(vars(measure(plain, expected.oracle)))


def test_yardstick_where_float16_overflows():
    case = next(case for case in CASES["relu_linear_attention"] if case.name == "large")
    operands = case.operands(torch.float16)
    assert not formula(case.op)(**operands).isfinite().all()
    expected = expect(case.op, operands)["output"]
    wide = formula(case.op)(operands["qkv"].float(), operands["head_dim"], operands["eps"])
    assert expected.yardstick == "float32 rounded to float16"
    assert vars(expected.plain) == pytest.approx(vars(measure(wide.half(), expected.oracle)))


def test_yardstick_where_only_an_intermediate_overflows():
    """1 / inf is 0: one pixel of what the float16 formula gives is wrong, yet finite."""
    operands = Case("layer_norm_2d", "squares", {"bias": False}).operands(torch.float16)
    operands["x"][0, :, 3, 4] *= 1000
    plain = formula("layer_norm_2d")(**operands)
    assert plain.isfinite().all()
    assert not plain[0, :, 3, 4].count_nonzero()
    expected = expect("layer_norm_2d", operands)["output"]
    assert budget(measure(plain, expected.oracle), torch.float16).frobenius < 1
    assert expected.yardstick == "float32 rounded to float16"


def test_yardstick_where_the_budget_would_let_zeros_pass():
    """The mean, 1002, is no bfloat16 number, and half a step is all the deviation there is."""
    x = torch.full((1, 64, 1, 1), 1000.0) + torch.arange(64).view(1, 64, 1, 1) % 2 * 4
    operands = {"x": x.bfloat16(), "weight": None, "bias": None, "eps": 1e-6}
    plain = measure(
        formula("layer_norm_2d")(**operands),
        formula("layer_norm_2d")(**{**operands, "x": x.bfloat16().double()}),
    )
    assert budget(plain, torch.bfloat16).frobenius >= 1
    expected = expect("layer_norm_2d", operands)["output"]
    assert expected.yardstick == "float32 rounded to bfloat16"


def test_yardstick_of_float64_is_that_of_float32_scaled():
    case = Case("mbconv", "yardstick", {})
    expected = expect("mbconv", case.operands(torch.float64))["output"]
    at_float32 = expect("mbconv", case.operands(torch.float32))["output"]
    assert expected.yardstick == "float32, scaled to float64"
    assert expected.plain.frobenius == pytest.approx(at_float32.plain.frobenius * 2**-29)
    assert expected.plain.maximum == pytest.approx(at_float32.plain.maximum * 2**-29)


def test_without_a_yardstick_there_is_no_passing():
    """Where plain PyTorch fails at float32, too, the case is at fault."""
    operands = Case("relu_linear_attention", "far out", {}).operands(torch.float32)
    operands["qkv"] = operands["qkv"] * 1e30
    (row,) = check("relu_linear_attention", operands, "reference")
    assert row.failure.startswith("the case shows nothing: plain PyTorch")
    assert row.yardstick == ""


def test_the_yardstick_is_computed_without_autocast():
    operands = Case("mbconv", "autocast", {}).operands(torch.float32)
    outside = expect("mbconv", operands)["output"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = expect("mbconv", operands)["output"]
    assert inside.plain == outside.plain


def test_threads_are_as_before():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        expect("mbconv", Case("mbconv", "threads", {}).operands(torch.float16))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_assertion_says_everything():
    operands = Case("layer_norm_2d", "assertion", {}).operands(torch.float16)
    assert_within_budget("layer_norm_2d", operands, "reference", gradients=True)
    with (
        made_up_backend("other", layer_norm_2d=layer_norm(WRONG["bias ignored"])),
        pytest.raises(AssertionError) as caught,
    ):
        assert_within_budget("layer_norm_2d", operands, "other", gradients=True)
    (line, ours, plain, allowed) = str(caught.value).splitlines()
    assert "layer_norm_2d on other, float16" in line
    assert "output [2, 24, 7, 9]: the error is" in line
    assert ours.startswith("  ours:   Frobenius ")
    assert plain.startswith("  plain:  Frobenius ")
    assert plain.endswith("(float16)")
    assert allowed.startswith("  budget: Frobenius ")
