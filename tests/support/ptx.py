"""Runs single instructions of PTX in the executor, one thread an element."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evsam_kernels import simt

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def entry(body: str, parameters: str = ".param .u64 data", name: str = "kernel") -> str:
    """The text of a module with one kernel; registers %p, %h, %r, %f, %d and %q are declared."""
    return f"""{HEADER}
.visible .entry {name}({parameters})
{{
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<40>;
    .reg .f32 %f<40>;
    .reg .b64 %q<16>;
    .reg .f64 %d<16>;
    {body}
    ret;
}}
"""


def evaluate(
    code: str,
    out: npt.DTypeLike,
    *inputs: npt.NDArray[np.generic],
    threads: int = 1,
) -> npt.NDArray[np.generic]:
    """What `code` computes for each element.

    It finds the elements of the inputs in registers `a`, `b`, `c` ... and leaves its result in
    `out`; `i` is the number of the thread.
    """
    dtypes = [array.dtype for array in inputs]
    count = inputs[0].size if inputs else 32
    result = np.zeros(count, out)
    names = [*"abcdefgh"[: len(inputs)], "out"]
    sizes = [*(dtype.itemsize for dtype in dtypes), result.itemsize]
    parameters = ", ".join(f".param .u64 p{name}" for name in names)
    lines = ["mov.u32 %r0, %ctaid.x;", "mov.u32 %r1, %ntid.x;", "mov.u32 %r2, %tid.x;"]
    lines += [".reg .b32 i;", "mad.lo.s32 i, %r0, %r1, %r2;"]
    for name, size in zip(names, sizes, strict=True):
        lines += [f".reg .b{max(8 * size, 16)} {name};", f".reg .b64 at_{name};"]
        lines += [
            f"ld.param.u64 at_{name}, [p{name}];",
            f"mad.wide.u32 at_{name}, i, {size}, at_{name};",
        ]
        if name != "out":
            lines.append(f"ld.global.b{8 * size} {name}, [at_{name}];")
    lines += [code, f"st.global.b{8 * result.itemsize} [at_out], out;"]
    block = min(count, 128)
    assert count % block == 0
    module = simt.Module(entry("\n    ".join(lines), parameters))
    report = module.launch(
        "kernel",
        count // block,
        block,
        0,
        [*map(np.ascontiguousarray, inputs), result],
        threads=threads,
    )
    report.raise_for_faults()
    return result
