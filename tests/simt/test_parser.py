"""Text of PTX: what is understood, and what malformed text is told."""

from __future__ import annotations

import numpy as np
import pytest

from evsam_kernels import simt
from tests.support.ptx import HEADER, entry, evaluate


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, "there is no .target"),
        (HEADER + ".visible .entry k() {", 4, "a function is not closed"),
        (HEADER + '.file 1 "name', 4, "a string is not closed"),
        (HEADER + "/* comment", 4, "a comment is not closed"),
        (HEADER + "#", 4, "unexpected character"),
        (HEADER + ".tex .u64 t;", 4, "unsupported directive .tex"),
        (HEADER + ".global .b8 x[99999999999];", 4, "the variable is too large"),
        (HEADER + ".global .b8 x[2] = {1, 2, 3};", 4, "more values than the variable has room"),
        (HEADER + ".address_size 32", 4, "only .address_size 64"),
        (entry("add.s32 %r1, %r2, %r3"), 14, "expected ',' or ';'"),
        (entry("bra nowhere;"), 13, "there is no label nowhere"),
        (entry("@%r1 bra x; x:"), 13, "the guard is not a predicate"),
        (entry("x: x:"), 13, "the label is defined twice"),
        (entry(".reg .b32 %z<99999999>;"), 13, "too many registers"),
        (entry("mov.u32 %r1, 0f12;"), 13, "not a number"),
        (entry("mov.u32 %r1, 99999999999999999999;"), 13, "not a number"),
        (entry("{" * 99), 13, "nested too deeply"),
        (entry("mov.u32 %r1, " + "!" * 99), 13, "nested too deeply"),
    ],
)
def test_malformed_text_names_its_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^PTX line {line}: .*") as error:
        simt.Module(text)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("instruction", "problem"),
    [
        ("wgmma.fence.sync.aligned;", "unsupported instruction"),
        ("cp.async.bulk.shared.global [%r1], [%q1], 16, [%r2];", "unsupported instruction"),
        ("tcgen05.fence::before_thread_sync;", "unsupported instruction"),
        ("mbarrier.init.shared.b64 [%r1], 1;", "unsupported instruction"),
        ("add.rn.rz.f32 %f1, %f2, %f3;", "unsupported modifier .rz"),
        ("add.s32.wrong %r1, %r2, %r3;", "unsupported modifier .wrong"),
        ("add.s32 %r1, %r2;", "an operand is missing"),
        ("add.s32 %r1, %r2, %r3, %r4;", "wrong number of operands"),
        ("add.s32 %q1, %r2, %r3;", "register %q1 does not hold a .s32"),
        ("add.s32 5, %r2, %r3;", "the result is not a register"),
        ("ld.global.u32 %r1, %r2;", "an address in brackets is needed"),
        ("ld.param.u32 %r1, [data+8];", "outside of the parameters"),
        ("mov.u32 %r1, %nonsense;", "unknown name %nonsense"),
        ("call other, ();", "the function other is not defined"),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f1};",
            "4 registers",
        ),
    ],
)
def test_unsupported_instructions_are_named(instruction: str, problem: str) -> None:
    module = simt.Module(entry(instruction))
    with pytest.raises(ValueError, match=r"^PTX line 13: ") as error:
        module.launch("kernel", 1, 1, 0, [0])
    assert problem in str(error.value)
    assert instruction.rstrip(";") in str(error.value)


def test_a_kernel_is_no_worse_for_its_neighbours() -> None:
    text = entry("wgmma.fence.sync.aligned;", name="bad") + entry("", name="good")[len(HEADER) :]
    module = simt.Module(text)
    module.launch("good", 1, 1, 0, [0]).raise_for_faults()
    with pytest.raises(ValueError, match="wgmma"):
        module.launch("bad", 1, 1, 0, [0])


def test_names_have_scopes() -> None:
    code = """
    { .reg .b32 t; mov.u32 t, 1; add.u32 %r5, a, t; bra next; next: }
    { .reg .b64 t; mov.u64 t, 2; cvt.u32.u64 %r6, t; bra next; next: }
    add.u32 out, %r5, %r6;"""
    a = np.arange(32, dtype="u4")
    np.testing.assert_array_equal(evaluate(code, "u4", a), a + 3)


def test_lines_of_inlined_functions_are_those_of_their_calls() -> None:
    body = """
    .loc 1 10 0
    mov.u32 %r1, 1;
    .loc 2 77 0, function_name $name, inlined_at 1 11 5
    mov.u32 %r2, 2;
    .loc 3 88 0, function_name $name, inlined_at 2 77 0
    mov.u32 %r3, 3;
    .loc 1 0 0
    mov.u32 %r4, 4;
    .loc 1 20 0
    mov.u32 %r5, 5;
    """
    files = '.file 1 "kernel.cu"\n.file 2 "header.cuh"\n.file 3 "deep.cuh"\n'
    module = simt.Module(entry(body) + files)
    lines = [(i.file, i.line) for i in module.instructions("kernel")[:5]]
    assert lines == [("kernel.cu", line) for line in (10, 11, 11, 11, 20)]


def test_variables_have_initial_values() -> None:
    table = """
.const .align 4 .b8 bytes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
.global .align 4 .f32 numbers[2] = {0f3F800000, 2.5};
.global .align 8 .u64 pointer = numbers+4;
"""
    body = """
    ld.param.u64 %q0, [data];
    ld.const.u32 %r1, [bytes+4];
    st.global.u32 [%q0], %r1;
    ld.global.u64 %q1, [pointer];
    ld.global.f32 %f1, [%q1];
    st.global.f32 [%q0+4], %f1;
    """
    out = np.zeros(2, "u4")
    text = entry(body)
    module = simt.Module(HEADER + table + text[len(HEADER) :])
    module.launch("kernel", 1, 1, 0, [out]).raise_for_faults()
    assert out[0] == 0x08070605
    assert out[1:].view("f4")[0] == 2.5


def test_functions_are_called() -> None:
    function = """
.func (.param .b32 result) weighted(.param .b32 x, .param .align 4 .b8 pair[8])
{
    .reg .b32 %r<5>;
    .reg .pred %p;
    ld.param.u32 %r1, [x];
    ld.param.u32 %r2, [pair+4];
    setp.gt.u32 %p, %r1, 15;
    @%p bra large;
    mad.lo.u32 %r3, %r1, %r2, 1;
    bra end;
    large:
    mov.u32 %r3, 7;
    end:
    st.param.b32 [result], %r3;
    ret;
}
"""
    body = """
    ld.param.u64 %q0, [data];
    mov.u32 %r0, %tid.x;
    {
    .param .b32 first;
    .param .align 4 .b8 second[8];
    .param .b32 answer;
    st.param.b32 [first], %r0;
    st.param.b32 [second+4], 10;
    call.uni (answer), weighted, (first, second);
    ld.param.b32 %r1, [answer];
    }
    mad.wide.u32 %q1, %r0, 4, %q0;
    st.global.u32 [%q1], %r1;
    """
    out = np.zeros(32, "u4")
    module = simt.Module(HEADER + function + entry(body)[len(HEADER) :])
    module.launch("kernel", 1, 32, 0, [out]).raise_for_faults()
    lanes = np.arange(32)
    np.testing.assert_array_equal(out, np.where(lanes > 15, 7, lanes * 10 + 1))


def test_recursion_is_refused() -> None:
    function = ".func again() { call again; ret; }\n"
    module = simt.Module(HEADER + function + entry("call again;")[len(HEADER) :])
    with pytest.raises(ValueError, match="recursive"):
        module.launch("kernel", 1, 1, 0, [0])
