"""Every kind of fault: a small kernel that commits it, and the next one that does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evsam_kernels import simt
from tests.support.ptx import entry

START = """
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %q0, [data];
    mov.u32 %r0, %tid.x;
    mov.u32 %r9, %ctaid.x;
    shl.b32 %r1, %r0, 2;
    mov.u32 %r2, tile;
    add.u32 %r2, %r2, %r1;
    xor.b32 %r3, %r1, 128;
    mov.u32 %r4, tile;
    add.u32 %r4, %r4, %r3;
    cvt.u64.u32 %q1, %r1;
    add.u64 %q1, %q0, %q1;
"""
# %r2 is the thread's own word of the tile, %r4 that of the thread 32 further or before, %q1 its own
# word of data


def launch(body: str, *, block: int = 64, grid: int = 1, **options: Any) -> simt.Report:
    data = np.zeros(256, "u4")
    initialised = options.pop("initialised", True)
    writable = options.pop("writable", True)
    buffer = simt.Buffer(data, "data", initialised=initialised, writable=writable)
    return simt.Module(entry(START + body)).launch("kernel", grid, block, 0, [buffer], **options)


def kinds(report: simt.Report) -> list[str]:
    return [fault.kind for fault in report.faults]


def test_a_clean_kernel_has_no_faults() -> None:
    report = launch(
        """st.shared.u32 [%r2], %r0;
        bar.sync 0;
        ld.shared.u32 %r5, [%r4];
        st.global.u32 [%q1], %r5;"""
    )
    assert report.faults == ()
    report.raise_for_faults()


@pytest.mark.parametrize(
    ("code", "buffer", "offset"),
    [
        ("ld.global.u32 %r5, [%q0+1024];", "data", 1024),
        ("st.global.u32 [%q0-4], %r5;", "data", -4),
        ("atom.global.add.u32 %r5, [%q0+1024], 1;", "data", 1024),
        ("red.global.add.u32 [%q0+1024], 1;", "data", 1024),
        ("ld.shared.u32 %r5, [tile+1024];", "shared", 1024),
        ("st.shared.v4.u32 [tile+1024], {%r0, %r0, %r0, %r0};", "shared", 1024),
        ("cp.async.ca.shared.global [tile], [%q0+1024], 4;", "data", 1024),
        (".local .b32 own[2]; mov.u64 %q2, own; ld.local.u32 %r5, [%q2+8];", "local", 8),
        ("ld.u32 %r5, [%q0+1024];", "data", 1024),
    ],
)
def test_out_of_bounds(code: str, buffer: str, offset: int) -> None:
    for check in (True, False):
        report = launch(code, block=1, check=check)
        faults = [fault for fault in report.faults if fault.kind == "out of bounds"]
        assert [(fault.buffer, fault.offset) for fault in faults] == [(buffer, offset)]
        assert code.split(";")[-2].strip().split("%q2+8")[0] in faults[0].instruction.text


@pytest.mark.parametrize(
    "code",
    [
        "ld.global.u32 %r5, [%q0+2];",
        "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%q0+8];",
        "st.shared.u16 [tile+1], 5;",
        "cp.async.cg.shared.global [tile], [%q0+8], 16;",
        "cp.async.cg.shared.global [tile+8], [%q0], 16;",
    ],
)
def test_misaligned(code: str) -> None:
    assert kinds(launch(code, block=1)) == ["misaligned"]


def test_read_only() -> None:
    report = launch("st.global.u32 [%q0], 1;", block=1, writable=False)
    assert kinds(report) == ["write to read-only memory"]


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        # Between warps: nothing but a barrier orders them.
        ("st.shared.u32 [%r2], %r0; ld.shared.u32 %r5, [%r4];", ["uninitialised read", "race"]),
        (
            "st.shared.u32 [%r2], 0; bar.sync 0; ld.shared.u32 %r5, [%r4]; st.shared.u32 [%r2], 1;",
            ["race"],
        ),
        (
            "st.shared.u32 [%r2], 0; bar.sync 0; ld.shared.u32 %r5, [%r4];"
            "bar.sync 0; st.shared.u32 [%r2], 1;",
            [],
        ),
        ("st.shared.u32 [tile], %r0;", ["race"]),
        ("st.shared.u32 [tile], 7;", []),  # the same value from everybody
        ("st.shared.u32 [%r2], 0; bar.sync 0; atom.shared.add.u32 %r5, [tile], 1;", []),
        (
            "st.shared.u32 [%r2], 0; bar.sync 0;"
            "atom.shared.add.u32 %r5, [tile], 1; ld.shared.u32 %r5, [tile];",
            ["race"],
        ),
        # Named barriers join those who take part.
        ("st.shared.u32 [%r2], 0; bar.sync 3, 64; ld.shared.u32 %r5, [%r4];", []),
        # Halves of a word are apart.
        (
            """.reg .b32 half;
            shl.b32 half, %r0, 1; add.u32 half, half, %r2; sub.u32 half, half, %r1;
            st.shared.u16 [half], 1; ld.shared.u16 %r5, [half];""",
            [],
        ),
    ],
)
def test_races_between_warps(code: str, faults: list[str]) -> None:
    assert set(kinds(launch(code))) == set(faults)


@pytest.mark.parametrize(
    ("order", "faults"),
    [
        ("", ["race"]),
        ("bar.warp.sync 0xffffffff;", []),
        ("shfl.sync.idx.b32 %r6, %r0, 0, 31, 0xffffffff;", []),
        ("vote.sync.any.pred %p1, %p2, 0xffffffff;", []),
    ],
)
def test_races_within_a_warp(order: str, faults: list[str]) -> None:
    code = f"""
    .reg .b32 next;
    xor.b32 next, %r2, 4;
    st.shared.u32 [%r2], %r0;
    bar.warp.sync 0xffffffff;
    ld.shared.u32 %r5, [next];
    {order}
    st.shared.u32 [%r2], 99;"""
    assert kinds(launch(code, block=32)) == faults


def test_a_race_names_both_sides() -> None:
    fault = launch(
        "st.shared.u32 [%r2], 0; bar.sync 0; ld.shared.u32 %r5, [%r4]; st.shared.u32 [%r2], 1;"
    ).faults[0]
    assert fault.instruction.text == "ld.shared.u32 %r5, [%r4]"
    assert fault.other_instruction is not None
    assert fault.other_instruction.text == "st.shared.u32 [%r2], 1"
    assert fault.other_thread is not None
    assert abs(fault.thread[0] - fault.other_thread[0]) == 32
    assert fault.buffer == "shared"
    assert fault.count > 1
    assert "and thread" in str(fault)


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("st.global.u32 [%q1], %r9;", ["race"]),
        ("ld.global.u32 %r5, [%q1];", []),
        ("red.global.add.u32 [%q1], 1;", []),
        (
            "setp.eq.u32 %p1, %r9, 0; @%p1 st.global.u32 [%q1], 1; ld.global.u32 %r5, [%q1];",
            ["race"],
        ),
        (
            "setp.eq.u32 %p1, %r9, 3; @%p1 st.global.u32 [%q1], 1; ld.global.u32 %r5, [%q1];",
            ["race"],
        ),
        ("ld.global.u32 %r5, [%q1]; red.global.add.u32 [%q1], 1;", ["race", "race"]),
        ("ld.volatile.global.u32 %r5, [%q1]; red.global.add.u32 [%q1], 1;", []),
    ],
)
def test_races_between_blocks(code: str, faults: list[str]) -> None:
    for threads in (1, 3):
        assert kinds(launch(code, grid=4, threads=threads)) == faults


LAST_BLOCK = """
    .shared .align 4 .b32 ticket;
    setp.ne.u32 %p1, %r0, 0;
    mad.wide.u32 %q2, %r9, 4, %q0;
    @%p1 bra wait;
    st.global.u32 [%q2+4], %r9;
    {release}
    {arrive}
    {acquire}
    st.shared.u32 [ticket], %r5;
    wait:
    bar.sync 0;
    ld.shared.u32 %r5, [ticket];
    setp.ne.u32 %p2, %r5, 3;
    @%p2 bra done;
    mad.wide.u32 %q3, %r0, 4, %q0;
    ld.global.u32 %r6, [%q3+4];
    done:
"""


@pytest.mark.parametrize(
    ("release", "arrive", "acquire", "clean"),
    [
        ("membar.gl;", "atom.global.add.u32 %r5, [%q0], 1;", "membar.gl;", True),
        ("", "atom.acq_rel.gpu.global.add.u32 %r5, [%q0], 1;", "", True),
        ("fence.acq_rel.gpu;", "atom.acquire.gpu.global.add.u32 %r5, [%q0], 1;", "", True),
        ("", "atom.global.add.u32 %r5, [%q0], 1;", "membar.gl;", False),
        ("membar.gl;", "atom.global.add.u32 %r5, [%q0], 1;", "", False),
        ("membar.cta;", "atom.global.add.u32 %r5, [%q0], 1;", "membar.gl;", False),
        (
            "membar.gl;",
            "ld.global.u32 %r5, [%q0]; add.u32 %r6, %r5, 1; st.global.u32 [%q0], %r6;",
            "membar.gl;",
            False,
        ),
    ],
)
def test_the_last_block_sees_what_the_others_released(
    release: str, arrive: str, acquire: str, clean: bool
) -> None:
    body = LAST_BLOCK.format(release=release, arrive=arrive, acquire=acquire)
    report = launch(body, block=4, grid=4)
    assert (report.faults == ()) == clean
    assert {fault.kind for fault in report.faults} <= {"race"}


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("ld.shared.u32 %r5, [%r2];", ["uninitialised read"]),
        ("ld.global.u32 %r5, [%q1];", ["uninitialised read"]),
        ("st.global.u16 [%q1], 1; ld.global.u32 %r5, [%q1];", ["uninitialised read"]),
        ("st.global.u32 [%q1], 1; ld.global.u32 %r5, [%q1];", []),
        (".local .b32 own[2]; mov.u64 %q2, own; ld.local.u32 %r5, [%q2];", ["uninitialised read"]),
        (".local .b32 own; mov.u64 %q2, own; st.local.u32 [%q2], 1; ld.local.u32 %r5, [%q2];", []),
        ("atom.global.add.u32 %r5, [%q1], 1;", ["uninitialised read"]),
    ],
)
def test_uninitialised_reads(code: str, faults: list[str]) -> None:
    assert kinds(launch(code, block=32, initialised=False)) == faults


COPY = """
    cp.async.ca.shared.global [%r2], [%q1], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r2+256], [%q1], 4;
    cp.async.commit_group;
    {wait}
    {barrier}
    ld.shared.u32 %r5, [{read}];
"""


@pytest.mark.parametrize(
    ("wait", "barrier", "read", "faults"),
    [
        ("cp.async.wait_group 1;", "bar.sync 0;", "%r4", []),
        ("cp.async.wait_group 1;", "bar.sync 0;", "%r4+256", ["unfinished copy"]),
        ("cp.async.wait_group 0;", "bar.sync 0;", "%r4+256", []),
        ("cp.async.wait_all;", "bar.sync 0;", "%r4+256", []),
        ("cp.async.wait_group 2;", "bar.sync 0;", "%r4", ["unfinished copy"]),
        ("cp.async.wait_group 0;", "", "%r2", []),
        ("cp.async.wait_group 0;", "", "%r4", ["race", "uninitialised read"]),
        ("", "bar.sync 0;", "%r2", ["unfinished copy"]),
    ],
)
def test_copies_have_to_be_waited_for(
    wait: str, barrier: str, read: str, faults: list[str]
) -> None:
    report = launch(COPY.format(wait=wait, barrier=barrier, read=read))
    assert set(kinds(report)) == set(faults)


def test_copies_land_when_waited_for() -> None:
    body = """
    mov.u32 %r5, 7;
    st.shared.u32 [%r2], %r5;
    cp.async.ca.shared.global [%r2], [%q1], 4;
    cp.async.commit_group;
    ld.shared.u32 %r6, [%r2];
    cp.async.wait_group 0;
    ld.shared.u32 %r7, [%r2];
    add.u32 %r7, %r7, %r6;
    st.global.u32 [%q1], %r7;"""
    data = np.full(32, 100, "u4")
    simt.Module(entry(START + body)).launch("kernel", 1, 32, 0, [data], check=False)
    np.testing.assert_array_equal(data, 107)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0;", "divergent barrier"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0;", "divergent barrier"),
        (
            "setp.lt.u32 %p1, %r0, 16; @%p1 bra x; bar.sync 0; bra y; x: bar.sync 0; y:",
            "divergent barrier",
        ),
        (
            "setp.lt.u32 %p1, %r0, 32; @%p1 bra x; bar.sync 1, 64; bra y; x: bar.sync 2, 64; y:",
            "deadlock",
        ),
        (
            "setp.lt.u32 %p1, %r0, 16; @%p1 bra x; bar.sync 0; x: bar.warp.sync 0xffffffff;",
            "divergent synchronisation",
        ),
        ("loop: bra loop;", "step limit"),
        ("trap;", "trap"),
        (
            "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.idx.b32 %r5, %r0, 20, 31, 0xffff;",
            "undefined shuffle",
        ),
    ],
)
def test_control(code: str, fault: str) -> None:
    report = launch(code, step_limit=10_000)
    assert fault in kinds(report)
    with pytest.raises(simt.FaultError, match=fault):
        report.raise_for_faults()


@pytest.mark.parametrize(
    "code",
    [
        # Lanes meet again behind what kept them apart, also in text that is out of order.
        "setp.lt.u32 %p1, %r0, 16; @%p1 bra cold; x: bar.sync 0; bra end;"
        "cold: mov.u32 %r5, 1; bra x; end:",
        "setp.lt.u32 %p1, %r0, 40; @%p1 mov.u32 %r5, 1;"
        "shfl.sync.down.b32 %r5, %r0, 1, 31, 0xffffffff;",
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra x; bar.sync 1, 32; bra y; x: bar.sync 2, 32; y:",
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra x; bar.sync 1, 64; bra y; x: bar.arrive 1, 64; y:",
    ],
)
def test_well_behaved_divergence(code: str) -> None:
    assert launch(code).faults == ()


def test_lanes_may_wait_for_each_other() -> None:
    """A lock that one lane after the other takes; the one that holds it gets its turn."""
    code = """
    .shared .align 4 .b32 lock;
    .shared .align 4 .b32 count;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra ready;
    st.shared.u32 [lock], 0;
    st.shared.u32 [count], 0;
    ready:
    bar.sync 0;
    again:
    atom.acquire.cta.shared.cas.b32 %r5, [lock], 0, 1;
    setp.ne.u32 %p2, %r5, 0;
    @%p2 bra again;
    ld.shared.u32 %r6, [count];
    add.u32 %r6, %r6, 1;
    st.shared.u32 [count], %r6;
    atom.release.cta.shared.exch.b32 %r5, [lock], 0;
    bar.sync 0;
    ld.shared.u32 %r6, [count];
    st.global.u32 [%q1], %r6;"""
    data = np.zeros(64, "u4")
    report = simt.Module(entry(START + code)).launch("kernel", 1, 64, 0, [data])
    assert report.faults == ()
    np.testing.assert_array_equal(data, 64)
