"""Runs PTX on the CPU; `evsam_kernels.simt` is the interface to use."""

import numpy as np
import numpy.typing as npt

Index = tuple[int, int, int]

class Parameter:
    name: str
    offset: int
    size: int
    pointer: bool

class Kernel:
    name: str
    parameters: list[Parameter]
    parameter_bytes: int
    static_shared: int
    local_bytes: int
    required_block: Index | None

class Instruction:
    text: str
    ptx_line: int
    file: str
    line: int
    kind: str

class Buffer:
    name: str
    address: int
    size: int
    writable: bool
    initialised: bool
    def __init__(
        self, name: str, address: int, size: int, writable: bool, initialised: bool
    ) -> None: ...

class Fault:
    kind: str
    message: str
    instruction: int
    block: Index
    thread: Index
    buffer: str
    offset: int
    other_block: Index | None
    other_thread: Index | None
    other_instruction: int | None
    count: int

class Launch:
    faults: list[Fault]
    counters: dict[str, npt.NDArray[np.uint64]]
    unique_bytes: dict[str, tuple[int, int]]

class Program:
    target: str
    kernels: list[Kernel]
    def __init__(self, ptx: str) -> None: ...
    def instructions(self, kernel: str) -> list[Instruction]: ...
    def launch(
        self,
        kernel: str,
        grid: Index,
        block: Index,
        dynamic_shared: int,
        parameters: bytes,
        buffers: list[Buffer],
        check: bool,
        threads: int,
        step_limit: int,
        sample: list[int],
    ) -> Launch: ...

class ReplayInstruction:
    def __init__(
        self,
        pipe: int,
        effect: int,
        occupied: float,
        latency: float,
        bytes: float,
        groups_left: int,
        reads: list[int],
        writes: list[int],
    ) -> None: ...

class Multiprocessor:
    def __init__(
        self,
        schedulers: int,
        l2_bytes_per_cycle: float,
        branch_latency: float,
        barrier_latency: float,
        block_latency: float,
    ) -> None: ...

def replay(
    instructions: list[ReplayInstruction],
    trace: npt.NDArray[np.uint32],
    multiprocessor: Multiprocessor,
    warps: int,
    resident: int,
    blocks: int,
) -> list[float]: ...
