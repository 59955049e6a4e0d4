"""Launching: arguments, limits, counters, reports, the same result for any number of threads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from evsam_kernels import simt
from tests.support.ptx import HEADER, entry

AXPY = entry(
    """
    ld.param.u64 %q0, [x];
    ld.param.u64 %q1, [y];
    ld.param.f32 %f0, [a];
    ld.param.u32 %r9, [n];
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r3, %r0, %r1, %r2;
    setp.ge.u32 %p1, %r3, %r9;
    @%p1 bra done;
    mad.wide.u32 %q2, %r3, 4, %q0;
    mad.wide.u32 %q3, %r3, 4, %q1;
    ld.global.f32 %f1, [%q2];
    ld.global.f32 %f2, [%q3];
    fma.rn.f32 %f3, %f0, %f1, %f2;
    st.global.f32 [%q3], %f3;
    done:
    """,
    ".param .u64 .ptr x, .param .u64 .ptr y, .param .f32 a, .param .u32 n",
)


def axpy(x: Any, y: Any, a: Any = 2.0, n: Any = 100, **options: Any) -> simt.Report:
    grid = options.pop("grid", 2)
    return simt.Module(AXPY).launch("kernel", grid, 64, 0, [x, y, a, n], **options)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_tensors_and_arrays_are_used_in_place(kind: str) -> None:
    x, y = torch.randn(100), torch.randn(100)
    want = torch.addcmul(y, torch.tensor(2.0), x)
    if kind == "torch":
        axpy(x, y).raise_for_faults()
    else:
        axpy(x.numpy(), y.numpy(), np.float32(2), np.uint32(100)).raise_for_faults()
    assert torch.equal(y, want)


def test_a_module_describes_its_kernels() -> None:
    module = simt.Module(AXPY, sources={"axpy.cu": "text"})
    (kernel,) = module.kernels
    assert module.target == "sm_80"
    assert module.ptx == AXPY
    assert module.sources == {"axpy.cu": "text"}
    assert [(p.name, p.offset, p.size, p.pointer) for p in kernel.parameters] == [
        ("x", 0, 8, True),
        ("y", 8, 8, True),
        ("a", 16, 4, False),
        ("n", 20, 4, False),
    ]
    assert kernel.required_block is None
    assert [i.kind for i in module.instructions("kernel")][:5] == ["parameter load"] * 4 + ["move"]


@pytest.mark.parametrize(
    ("changed", "error", "problem"),
    [
        ({"x": torch.zeros(100, device="meta")}, ValueError, r"args\[0\] is on meta"),
        ({"x": torch.zeros(4, 200)[:, ::2]}, ValueError, r"args\[0\] is not dense"),
        ({"x": np.zeros((4, 200), "f4")[:, ::2]}, ValueError, r"args\[0\] is not dense"),
        ({"x": "text"}, TypeError, r"args\[0\] must be a tensor.* got str"),
        ({"x": np.float32(1)}, ValueError, r"args\[0\] takes 4 bytes.* has 8"),
        ({"n": 1 << 32}, ValueError, r"args\[3\] is 4294967296, which 4 bytes cannot hold"),
        ({"n": torch.zeros(1)}, ValueError, r"args\[3\] takes 8 bytes.* has 4"),
        ({"grid": 0}, ValueError, "grid must be positive, got 0"),
        ({"grid": (1, 1, 1, 1)}, ValueError, "grid must be one to three integers"),
        ({"grid": (1, 70000)}, ValueError, "grid must have"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"step_limit": 0}, ValueError, "step_limit must be 1 to"),
    ],
)
def test_bad_launches_are_refused(
    changed: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        axpy(**({"x": torch.zeros(100), "y": torch.zeros(100)} | changed))


def test_blocks_of_a_wrong_size_are_refused() -> None:
    text = AXPY.replace("\n{", "\n.reqntid 32, 2, 1\n{", 1)
    args = [torch.zeros(100), torch.zeros(100), 2.0, 100]
    with pytest.raises(ValueError, match=r"block must be \(32, 2, 1\), which .* requires"):
        simt.Module(text).launch("kernel", 1, 64, 0, args)
    assert simt.Module(text).launch("kernel", 1, (32, 2), 0, args).block == (32, 2, 1)
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        simt.Module(AXPY).launch("kernel", 1, 1025, 0, args)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        simt.Module(AXPY).launch("kernel", 1, 64, 300_000, args)
    with pytest.raises(ValueError, match="args must have 4 values"):
        simt.Module(AXPY).launch("kernel", 1, 64, 0, args[:2])
    with pytest.raises(ValueError, match="there is no kernel 'axpy'; the module has kernel"):
        simt.Module(AXPY).launch("axpy", 1, 64, 0, args)


def test_arguments_that_share_memory() -> None:
    x = torch.randn(100)
    want = 3 * x
    report = axpy(x, x)
    assert report.faults == ()
    torch.testing.assert_close(x, want)
    assert list(report.unique_bytes) == ["x = y"]


def test_counters() -> None:
    x, y = torch.zeros(101), torch.zeros(101)
    start = x.data_ptr() % 32
    report = axpy(x, y)
    by_text = {i.text.split()[0]: n for n, i in enumerate(report.instructions)}
    load, fma = by_text["ld.global.f32"], by_text["fma.rn.f32"]
    counted = {name: int(values[load]) for name, values in report.counters.items()}
    assert counted["warp_executions"] == counted["requests"] == 4
    assert counted["lane_executions"] == 100
    assert counted["bytes"] == 400
    assert counted["ideal_sectors"] == 13
    if start == 0:
        assert counted["sectors"] == 13
    assert counted["wavefronts"] == 0
    assert report.counters["requests"][fma] == 0
    assert report.unique_bytes == {"x": (400, 0), "y": (400, 400)}
    assert report.by_kind["fp32"]["lane_executions"] == 100
    (line,) = report.by_line
    assert line.counters["bytes"] == 1200
    assert line.by_kind == report.by_kind
    assert line.mma == report.mma == {}
    assert "no faults" in str(report)


def test_bank_conflicts_and_strides_are_counted() -> None:
    body = """
    .shared .align 16 .b8 tile[8192];
    ld.param.u64 %q0, [data];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, tile;
    mad.lo.u32 %r2, %r0, {stride}, %r1;
    st.shared.u32 [%r2], 1;
    mad.wide.u32 %q1, %r0, {stride}, %q0;
    ld.global.u32 %r3, [%q1];
    mul.lo.u32 %r4, %r0, 16;
    add.u32 %r4, %r4, %r1;
    bar.warp.sync 0xffffffff;
    st.shared.v4.u32 [%r4], {{%r3, %r3, %r3, %r3}};
    bar.warp.sync 0xffffffff;
    ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [tile];
    """
    data = torch.zeros(4096 + 8, dtype=torch.int32)
    data = data[(-data.data_ptr() % 32) // 4 :][:4096]
    for stride, wavefronts, sectors in ((4, 1, 4), (8, 2, 8), (128, 32, 32), (0, 1, 1)):
        report = simt.Module(entry(body.format(stride=stride))).launch("kernel", 1, 32, 0, [data])
        at = {i.text.split()[0]: n for n, i in enumerate(report.instructions)}
        assert report.counters["wavefronts"][at["st.shared.u32"]] == wavefronts
        assert report.counters["ideal_wavefronts"][at["st.shared.u32"]] == 1
        assert report.counters["sectors"][at["ld.global.u32"]] == sectors
        assert report.counters["ideal_sectors"][at["ld.global.u32"]] == (4 if stride else 1)
        assert report.counters["wavefronts"][at["st.shared.v4.u32"]] == 4
        assert report.counters["wavefronts"][at["ld.shared.v4.u32"]] == 1


def test_unchecked_launches_count_executions_and_stay_in_bounds() -> None:
    x, y = torch.ones(100), torch.ones(100)
    report = axpy(x, y, n=101, check=False)
    assert {fault.kind for fault in report.faults} == {"out of bounds"}
    assert not report.counters["sectors"].any()
    assert report.counters["lane_executions"].sum() > 0
    assert report.unique_bytes == {}
    assert torch.equal(y, torch.full((100,), 3.0))
    assert "unchecked" in str(axpy(x, y, check=False))


def test_the_number_of_threads_changes_nothing() -> None:
    def run(threads: int) -> tuple[Any, ...]:
        x, y = torch.arange(2000.0), torch.zeros(2000)
        report = axpy(x, y, n=2003, grid=32, threads=threads)
        counters = {name: values.tolist() for name, values in report.counters.items()}
        return y.tolist(), report.faults, {k: v for k, v in counters.items() if "sectors" not in k}

    assert run(1) == run(4)


def test_atomics_of_floats_are_in_the_order_of_blocks() -> None:
    body = """
    ld.param.u64 %q0, [data];
    mov.u32 %r0, %ctaid.x;
    cvt.rn.f32.u32 %f0, %r0;
    add.f32 %f0, %f0, 0f3DCCCCCD;
    rcp.rn.f32 %f0, %f0;
    red.global.add.f32 [%q0], %f0;"""
    want = np.float32(0)
    for block in range(200):
        for _ in range(32):
            want += np.float32(1) / (np.float32(block) + np.float32(0.1))
    for threads in (1, 4):
        total = np.zeros(1, "f4")
        module = simt.Module(entry(body))
        module.launch("kernel", 200, 32, 0, [total], threads=threads).raise_for_faults()
        assert total[0] == want


def test_a_launch_can_be_interrupted() -> None:
    code = f"""
import signal, threading
from evsam_kernels import simt
module = simt.Module({entry("loop: bra loop;")!r})
signal.alarm(1)
signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
try:
    for _ in range(1000):
        module.launch("kernel", 1, 32, 0, [0], check=False)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n", done.stderr


def test_the_package_is_imported_without_the_executor() -> None:
    code = """
import sys, evsam_kernels.simt
assert "evsam_kernels._simt" not in sys.modules
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registers_start_at_zero_and_shared_memory_at_nan() -> None:
    body = """
    .shared .align 4 .b32 word;
    ld.param.u64 %q0, [data];
    st.global.u32 [%q0], %r30;
    ld.shared.u32 %r1, [word];
    st.global.u32 [%q0+4], %r1;"""
    out = np.ones(2, "u4")
    simt.Module(entry(body)).launch("kernel", 1, 1, 0, [out], check=False)
    assert out.tolist() == [0, 0xFFFFFFFF]


def test_dynamic_shared_memory_follows_the_static() -> None:
    text = entry(
        """
    .shared .align 4 .b8 fixed[20];
    ld.param.u64 %q0, [data];
    mov.u32 %r1, fixed;
    mov.u32 %r2, dynamic;
    mov.u32 %r3, %dynamic_smem_size;
    st.shared.u8 [dynamic+99], 1;
    st.global.v4.u32 [%q0], {%r1, %r2, %r3, %r3};"""
    )
    text = text.replace(HEADER, HEADER + ".extern .shared .align 128 .b8 dynamic[];\n")
    out = np.zeros(4, "u4")
    module = simt.Module(text)
    module.launch("kernel", 1, 1, 100, [out]).raise_for_faults()
    assert out.tolist() == [0, 128, 100, 100]
    (fault,) = module.launch("kernel", 1, 1, 99, [out]).faults
    assert fault.kind == "out of bounds"


def test_only_the_chosen_blocks_run() -> None:
    x, y = torch.randn(640), torch.zeros(640)
    report = axpy(x, y, n=640, grid=10, blocks=[7, 2, 7])
    report.raise_for_faults()
    want = torch.zeros(640)
    for block in (2, 7):
        want[64 * block : 64 * (block + 1)] = 2 * x[64 * block : 64 * (block + 1)]
    torch.testing.assert_close(y, want)
    assert report.blocks_run == (2, 7)
    assert report.buffer_bytes == {"x": 2560, "y": 2560}
    whole = axpy(x, y, n=640, grid=10)
    assert list(whole.blocks_run) == list(range(10))
    executions = whole.counters["warp_executions"]
    assert (report.counters["warp_executions"] * 5 == executions).all()


def test_faults_of_chosen_blocks_are_found_and_name_them() -> None:
    x, y = torch.randn(100), torch.randn(100)
    assert not axpy(x, y, n=640, grid=10, blocks=[0]).faults
    fault = axpy(x, y, n=640, grid=10, blocks=[0, 9]).faults[0]
    assert (fault.kind, fault.block) == ("out of bounds", (9, 0, 0))


@pytest.mark.parametrize("blocks", [[], [2], [-1, 0]])
def test_blocks_outside_of_the_grid_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match="blocks must be indices below 2"):
        axpy(torch.randn(100), torch.randn(100), blocks=blocks)
