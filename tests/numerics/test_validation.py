"""The validation report: what is planned, what errors become, how rows are summed up."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import made_up_backend

from evsam_kernels import simt
from evsam_kernels.backends import BACKENDS, Backend
from evsam_kernels.numerics.budget import Errors, Row
from evsam_kernels.numerics.cases import CASES
from evsam_kernels.numerics.validation import (
    DTYPES,
    Step,
    available_backends,
    badness,
    plan,
    summarise,
    validate,
)
from evsam_kernels.ops.registry import OPERATIONS, formula


def row(op="conv_act", backend="reference", dtype="float32", ours=0.5, failure="") -> Row:
    ones = Errors(1.0, 1.0)
    return Row(
        op=op,
        case="case",
        backend=backend,
        dtype=dtype,
        quantity="output",
        shape=(1,),
        ours=Errors(ours, 0.0),
        plain=ones,
        budget=ones,
        yardstick=dtype,
        failure=failure,
    )


def test_the_whole_plan_is_everything():
    steps = plan()
    assert len(steps) == len(DTYPES) * sum(map(len, CASES.values()))
    assert {step.case.op for step in steps} == set(OPERATIONS)
    assert all(
        step.backends == available_backends(step.case.op, "cpu", DTYPES[step.dtype])
        for step in steps
    )


def test_a_plan_may_be_restricted():
    steps = plan(["mbconv", "upsample_add"], ["reference"], ["float16"], quick=True)
    assert {step.case.op for step in steps} == {"mbconv", "upsample_add"}
    assert {step.backends for step in steps} == {("reference",)}
    assert {step.dtype for step in steps} == {"float16"}
    assert all(step.case.quick for step in steps)
    assert len(steps) == sum(case.quick for op in ("mbconv", "upsample_add") for case in CASES[op])


def test_backends_that_cannot_run_are_left_out(monkeypatch):
    monkeypatch.setitem(
        BACKENDS, "cpu", Backend("cpu", "C++", ("cpu",), lambda: "it was not built")
    )
    assert available_backends("layer_norm_2d", "cpu") == ("reference",)
    assert plan(["layer_norm_2d"], ["cpu"]) == []


def test_backends_for_other_devices_are_left_out():
    assert available_backends("layer_norm_2d", "cuda") == ("reference",)
    assert all(step.backends == ("reference",) for step in plan(device="meta"))


def test_a_backend_made_later_is_covered():
    with made_up_backend("other", mbconv=formula("mbconv")):
        assert available_backends("mbconv", "cpu")[-1] == "other"
        assert available_backends("conv_act", "cpu").count("other") == 0


def test_quick_cases_have_gradients_and_layers_do_not():
    case = next(case for case in CASES["layer_norm_2d"] if case.quick)
    layer = next(case for case in CASES["layer_norm_2d"] if not case.quick)
    rows = {
        step.case.name: next(validate([step]))
        for step in plan(["layer_norm_2d"], ["reference"], ["float32"])
        if step.case in (case, layer)
    }
    assert [row.quantity for row in rows[case.name]] == [
        "output",
        "gradient of x",
        "gradient of weight",
        "gradient of bias",
    ]
    assert [row.quantity for row in rows[layer.name]] == ["output"]


def test_an_error_becomes_a_failed_row_and_the_others_go_on():
    def broken(*operands):
        raise OSError("no such kernel")

    with made_up_backend("other", upsample_add=broken):
        steps = plan(["upsample_add"], ["reference", "other"], ["float32"], quick=True)[:2]
        rows = [row for found in validate(steps) for row in found]
    failed = [row for row in rows if not row.passed]
    assert [row.failure for row in failed] == ["OSError: no such kernel"] * 2
    assert {row.backend for row in failed} == {"other"}
    assert {row.backend for row in rows if row.passed} == {"reference"}
    assert failed[0].shape == (2, 8, 16, 16)


def test_rows_come_step_by_step():
    found = validate(plan(["upsample_add"], ["reference"], ["float32"]))
    assert all(row.case == CASES["upsample_add"][0].name for row in next(found))
    assert all(row.case == CASES["upsample_add"][1].name for row in next(found))


def test_summaries_keep_the_worst_row():
    rows = [
        row(ours=0.2),
        row(ours=0.9),
        row(ours=0.5),
        row(dtype="float16", ours=0.99),
        row(dtype="float16", ours=0.1, failure="broken"),
        row(op="mbconv"),
    ]
    first, second, third = summarise(rows)
    assert (first.op, first.dtype, first.count, first.failed) == ("conv_act", "float32", 3, 0)
    assert first.worst is rows[1]
    assert (second.dtype, second.count, second.failed) == ("float16", 2, 1)
    assert second.worst is rows[4]
    assert (third.op, third.count) == ("mbconv", 1)


def test_rows_without_a_ratio_are_the_worst():
    lost = row(ours=math.nan, failure="broken")
    assert max([row(ours=5.0, failure="far"), lost], key=badness) is lost


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_validation_on_a_gpu():
    rows = [row for found in validate(plan(quick=True, device="cuda"), "cuda") for row in found]
    assert not [str(row) for row in rows if not row.passed]


def test_float32_is_not_rounded_to_tf32(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    (case,) = (case for case in CASES["conv_act"] if case.name == "1x1")
    with simt.emulate():
        (rows,) = validate([Step(case, "float32", ("triton",))])
    assert rows and all(row.passed for row in rows), rows
    assert torch.backends.cudnn.allow_tf32
