"""Estimates what a launch takes on a GPU, uncalibrated: its machine code against a scoreboard.

A bound adds up work as if everything overlapped. The replay asks what does overlap: it lets the
warps of the blocks that one multiprocessor holds at once issue their machine code in order, each
instruction when its operands are there and its pipe is free, with barriers and groups of
asynchronous copies. How often each piece of machine code runs follows from what the executor
counted: it is assembled with the PTX's line numbers, so that every load, store, copy, barrier and
matrix product is known by the PTX instruction it was made of, and the flow through the basic blocks
is the one that agrees best with those counts.

What it leaves out: caches (what blocks share comes from L2, at the multiprocessor's even share;
what plain loads repeat within a launch, from L1), DRAM beyond the bound's term, the operands'
register banks, the instruction cache, divergence (all warps take the average path). No constant was
fitted, so that it is good for ranking kernels on one GPU and not for times.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources as files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evsam_kernels.simt import sass, toolchain
from evsam_kernels.simt.bounds import bound
from evsam_kernels.simt.emulation import Launch
from evsam_kernels.simt.gpus import Gpu, gpu
from evsam_kernels.simt.module import Module, executor
from evsam_kernels.simt.occupancy import Occupancy, occupancy
from evsam_kernels.simt.report import Report
from evsam_kernels.simt.resources import Resources, assemble, resources
from evsam_kernels.simt.sass import EXIT, BasicBlock, Sass

_LANES = 32
_SECTOR = 32
_L1_BYTES = 128  # A clock.
_SCHEDULERS = 4
_MOST_STEPS = 2_000_000
_ROUNDS = 4  # Times that every resident block is replaced before extrapolating.
_DISAGREEMENT = 0.02

_PIPES = ("none", "tensor", "fma", "alu", "special", "uniform", "memory")
_EFFECTS = ("none", "branch", "barrier", "load", "store", "copy", "commit", "wait")

_ANCHORS = {
    **{"HMMA": "mma", "IMMA": "mma", "DMMA": "mma", "LDSM": "matrix load", "LDGSTS": "async copy"},
    **{"LDG": "global load", "STG": "global store", "LDS": "shared load", "STS": "shared store"},
    **{"BAR": "barrier", "SHFL": "shuffle"},
}
"""Machine code that the assembler makes one for one of PTX instructions of a kind."""

_FMA = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "HADD2")
_SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV", "S2R", "S2UR")


class ReplayError(Exception):
    """The machine code cannot be replayed as the executor's counts say it ran."""


@dataclass(frozen=True)
class Estimate:
    """What a launch may take: an estimate, uncalibrated, and no time.

    Attributes:
        gpu: where.
        seconds: of the launch; never less than its bound.
        block_cycles: that one more block adds on a multiprocessor that is busy.
        steps: machine instructions that each warp issued.
        replayed, counted: instructions of a warp by kind, as replayed and as the executor counted
            them on the average, where machine code corresponds to PTX one for one.
        resources, occupancy: what the kernel takes, and how much of it fits.
    """

    gpu: Gpu
    seconds: float
    block_cycles: float
    steps: int
    replayed: dict[str, float]
    counted: dict[str, float]
    resources: Resources
    occupancy: Occupancy

    @property
    def disagreeing(self) -> tuple[str, ...]:
        """Kinds that are replayed more than 2 % more or less often than they were counted.

        The estimate is doubtful then: blocks or warps do unequal work, or the machine code branches
        where the PTX does not.
        """
        return _disagreeing(self.replayed, self.counted)

    def __str__(self) -> str:
        text = (
            f"{self.gpu.name}: {1e6 * self.seconds:.3g} us (estimate, uncalibrated: "
            f"{self.block_cycles:.0f} cycles a block, {self.occupancy.blocks} at once)"
        )
        if self.disagreeing:
            text += f"; doubtful, as counts of {', '.join(self.disagreeing)} disagree"
        return text


def _disagreeing(replayed: dict[str, float], counted: dict[str, float]) -> tuple[str, ...]:
    return tuple(
        kind
        for kind, count in counted.items()
        if abs(replayed[kind] - count) > _DISAGREEMENT * count
    )


@dataclass(frozen=True)
class Constants:
    """Latencies (cycles) and throughputs (lanes a clock of a multiprocessor) of an architecture."""

    alu_lanes: float
    shuffle_lanes: float
    tensor_latency_k16: float
    tensor_latency_k8: float
    arithmetic_latency: float
    special_latency: float
    shared_latency: float
    l1_latency: float
    global_latency: float
    uniform_latency: float
    branch_latency: float
    barrier_latency: float
    block_latency: float


def constants(arch: int) -> Constants:
    """What was published of an architecture's latencies; replay.json says where.

    Raises:
        ValueError: nothing is known of that architecture.
    """
    known = _data()["architectures"]
    if str(arch) not in known:
        raise ValueError(
            f"there are no latencies of sm_{arch} to replay with; there are those of "
            f"{', '.join(f'sm_{name}' for name in known)}"
        )
    return Constants(**{name: entry["value"] for name, entry in known[str(arch)].items()})


def _data() -> dict[str, Any]:
    text = files.files(__package__).joinpath("replay.json").read_text("utf-8")
    return dict(json.loads(text))


def replay(launch: Launch, on: str | Gpu = "a100-40gb") -> Estimate:
    """Estimate what a launch takes on a GPU. The estimate ranks kernels; it is no time.

    Args:
        launch: from an emulation, or `Launch(module, report)`; its report that of a checked launch.
        on: the GPU, one of `GPUS` or its key.

    Raises:
        ValueError: there is no such GPU, nothing is known of its latencies, the launch was not
            checked, or not one block fits a multiprocessor.
        ReplayError: no path through the machine code agrees with the counts.
        ToolNotFoundError: ptxas or nvdisasm is not installed.
        ImportError: SciPy is not installed.
    """
    where = gpu(on) if isinstance(on, str) else on
    report = launch.report
    known = constants(where.arch)
    least = bound(report, where).seconds  # Checks the report, too.
    takes, code = machine_code(launch.module, report.kernel, where.arch)
    threads = math.prod(report.block)
    fits = occupancy(
        where.arch,
        threads=threads,
        registers=takes.registers,
        shared=takes.shared + report.shared,
        barriers=takes.barriers or 0,
    )
    if fits.blocks == 0:
        raise ValueError(f"no block of {report.kernel} fits a multiprocessor of {where.name}")

    warps = math.ceil(threads / _LANES)
    counts = _Counts(report, warps)
    blocks = sass.basic_blocks(code)
    trace = expand(blocks, flow(blocks, _equations(code, blocks, counts)))
    counted = {kind: counts.by_kind(kind) for kind in sorted({*_ANCHORS.values()})}
    replayed = _by_kind(code, trace, counts)
    if "mma" in _disagreeing(replayed, counted):
        raise ReplayError(
            f"{report.kernel}: a warp runs {counted['mma']:g} matrix products, but its machine "
            f"code replays {replayed['mma']:g}"
        )

    clock = where.rates["issue"].per_second / (_SCHEDULERS * where.sms)
    machine = _Machine(where, known, clock, counts)
    on_busiest = math.ceil(math.prod(report.grid) / where.sms)
    cycles, block_cycles = _run(machine, code, trace, warps, fits.blocks, on_busiest)
    return Estimate(
        where,
        max(cycles / clock, least),
        block_cycles,
        len(trace),
        replayed,
        counted,
        takes,
        fits,
    )


@functools.lru_cache(maxsize=32)
def machine_code(module: Module, kernel: str, arch: int) -> tuple[Resources, tuple[Sass, ...]]:
    """What a kernel takes, and its instructions, each with the PTX line it comes from.

    Kept, as models launch few kernels many times.
    """
    cubin, log = assemble(module, arch, kernel=kernel, ptx_lines=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = toolchain.run("nvdisasm", ["-c", "-g", path])
    found = resources(cubin, log=log, listing=listing)
    return found[kernel], tuple(sass.read(listing, kernel))


class _Counts:
    """What a warp did on the average, by PTX line."""

    def __init__(self, report: Report, warps: int) -> None:
        self._of_line: dict[int, int] = {
            instruction.ptx_line: index for index, instruction in enumerate(report.instructions)
        }
        self._report = report
        self._warps = warps * len(report.blocks_run)
        loaded = sum(
            int(report.counters["bytes"][index])
            for index, instruction in enumerate(report.instructions)
            if instruction.kind == "global load"
        )
        read = sum(read for read, _ in report.unique_bytes.values())
        self.share_past_l1 = min(1.0, read / loaded) if loaded else 1.0

    def kind(self, line: int) -> str:
        """What the PTX instruction of a line is; "" for none."""
        index = self._of_line.get(line)
        if index is None:
            return ""
        instruction = self._report.instructions[index]
        # One that the lanes of a warp meet at is none in machine code.
        return "warp barrier" if "bar.warp." in instruction.text else instruction.kind

    def predicated(self, line: int) -> bool:
        """Whether it runs under a predicate."""
        return self._report.instructions[self._of_line[line]].text.startswith("@")

    def executions(self, line: int) -> float:
        """How often a warp ran it."""
        return self._counter("warp_executions", line) / self._warps

    def each(self, counter: str, line: int) -> float:
        """What one execution was counted to do; 0 where it never ran."""
        executions = self._counter("warp_executions", line)
        return self._counter(counter, line) / executions if executions else 0.0

    def by_kind(self, kind: str) -> float:
        """How often a warp ran instructions of a kind that are not predicated."""
        return sum(
            self.executions(line)
            for line in self._of_line
            if self.kind(line) == kind and not self.predicated(line)
        )

    def _counter(self, name: str, line: int) -> float:
        index = self._of_line.get(line)
        return 0.0 if index is None else float(self._report.counters[name][index])


def _anchored(code: Sequence[Sass], counts: _Counts) -> Iterator[tuple[int, str]]:
    """Indices of the instructions whose executions are known by their PTX line, and their kind."""
    for index, instruction in enumerate(code):
        kind = _ANCHORS.get(instruction.opcode)
        if kind is None or counts.kind(instruction.line) != kind or instruction.predicate:
            continue
        if not counts.predicated(instruction.line):
            yield index, kind


@dataclass(frozen=True)
class Equations:
    """What is known of how often basic blocks run.

    Attributes:
        copies: `[equations, blocks]`: instructions of each block that count into an equation.
        executions: `[equations]`: how often a warp ran them in all.
        certainty: `[equations]`: how much an equation weighs.
    """

    copies: npt.NDArray[np.float64]
    executions: npt.NDArray[np.float64]
    certainty: npt.NDArray[np.float64]


def _equations(code: Sequence[Sass], blocks: Sequence[BasicBlock], counts: _Counts) -> Equations:
    """What the executor's counts say of basic blocks.

    An anchored PTX instruction ran as often as its copies; equations over the same blocks are added
    up. A block without any probably runs as often as the PTX that most of it comes from.
    """
    block_of = {index: n for n, block in enumerate(blocks) for index in block.instructions}
    copies: defaultdict[int, list[int]] = defaultdict(lambda: [0] * len(blocks))
    for index, _ in _anchored(code, counts):
        copies[code[index].line][block_of[index]] += 1
    merged: dict[tuple[bool, ...], list[Any]] = {}
    for line, row in copies.items():
        entry = merged.setdefault(tuple(n > 0 for n in row), [np.zeros(len(blocks)), 0.0])
        entry[0] += np.array(row)
        entry[1] += counts.executions(line)
    equations = [(row, executions, 1.0) for row, executions in merged.values()]
    for number, block in enumerate(blocks):
        if not any(row[number] for row, _, _ in equations):
            lines = [code[index].line for index in block.instructions]
            # A branch of the PTX may be several in machine code, each taken at times.
            kinds = ("", "control")
            known = [counts.executions(line) for line in lines if counts.kind(line) not in kinds]
            if known:
                guess = float(np.median(known))
                equations.append((np.eye(len(blocks))[number], guess, _GUESSED))
    rows, executions, certainty = zip(*equations, strict=True)
    return Equations(np.array(rows), np.array(executions), np.array(certainty))


Flow = dict[tuple[int, int], float]
"""How often each edge between basic blocks is taken, by the blocks it joins."""

_CONSERVED = 1e3
_GUESSED = 1e-2
_UNKNOWN = 1e-6


def flow(blocks: Sequence[BasicBlock], known: Equations) -> Flow:
    """The flow from entry to exit that agrees best with what is known, and is least elsewhere."""
    edges = [(n, successor) for n, block in enumerate(blocks) for successor in block.successors]
    leaving = np.zeros((len(blocks), len(edges)))
    arriving = np.zeros_like(leaving)
    for number, (start, end) in enumerate(edges):
        leaving[start, number] = 1
        if end != EXIT:
            arriving[end, number] = 1
    entered = np.zeros(len(blocks))
    entered[0] = 1
    # Counts differ by orders of magnitude and matter alike.
    weight = known.certainty / np.maximum(known.executions, 1)
    matrix = np.vstack(
        [
            _CONSERVED * (leaving - arriving),
            weight[:, None] * (known.copies @ leaving),
            _UNKNOWN * np.eye(len(edges)),
        ]
    )
    target = np.concatenate([_CONSERVED * entered, weight * known.executions, np.zeros(len(edges))])
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise ImportError("replay needs SciPy: pip install scipy") from error
    found, _ = nnls(matrix, target)
    return dict(zip(edges, found.tolist(), strict=True))


def expand(blocks: Sequence[BasicBlock], taken: Flow) -> npt.NDArray[np.uint32]:
    """The instructions that a warp issues, in order, where it takes edges as often as a flow says.

    Raises:
        ReplayError: there are too many, or they never end.
    """
    inner = _innermost(blocks)
    credit: defaultdict[tuple[int, int], float] = defaultdict(float)
    pieces: list[range] = []
    steps = 0
    current = 0
    while current != EXIT:
        block = blocks[current]
        pieces.append(block.instructions)
        steps += len(block.instructions)
        if steps > _MOST_STEPS:
            raise ReplayError(f"a warp would issue more than {_MOST_STEPS} machine instructions")
        current = _next(current, block, taken, credit, inner.get(current))
    return np.concatenate([np.arange(p.start, p.stop, dtype=np.uint32) for p in pieces])


def _innermost(blocks: Sequence[BasicBlock]) -> dict[int, range]:
    """The blocks of the innermost loop round each block."""
    inner: dict[int, range] = {}
    for first, last in sass.loops(blocks):
        for number in range(first, last + 1):
            inner.setdefault(number, range(first, last + 1))
    return inner


def _next(
    current: int,
    block: BasicBlock,
    taken: Flow,
    credit: defaultdict[tuple[int, int], float],
    loop: range | None,
) -> int:
    """Which block follows: each edge gains its share of the visits, and pays for being taken."""
    edges = [(current, successor) for successor in block.successors]
    total = sum(taken[edge] for edge in edges)
    if len(edges) == 1 or total <= 0:
        return block.successors[-1]
    for edge in edges:
        credit[edge] += taken[edge] / total
    # A loop is left when its last round has come, not when that is half way through.
    leaving = [edge for edge in edges if loop is not None and edge[1] not in loop]
    staying = [edge for edge in edges if edge not in leaving]
    due = [edge for edge in leaving if credit[edge] > 1 - 0.5 * taken[edge] / total]
    chosen = max(due or staying or edges, key=lambda edge: credit[edge])
    credit[chosen] -= 1
    return chosen[1]


def _by_kind(
    code: Sequence[Sass], trace: npt.NDArray[np.uint32], counts: _Counts
) -> dict[str, float]:
    executions = np.bincount(trace, minlength=len(code))
    found = dict.fromkeys(sorted({*_ANCHORS.values()}), 0.0)
    for index, kind in _anchored(code, counts):
        found[kind] += float(executions[index])
    return found


class _Machine:
    """What instructions cost on a GPU."""

    def __init__(self, where: Gpu, known: Constants, clock: float, counts: _Counts) -> None:
        self._gpu, self._known, self._clock, self._counts = where, known, clock, counts

    def _cycles(self, limit: str, amount: float) -> float:
        """How long one scheduler's share of a published rate takes."""
        rates = self._gpu.rates
        if limit not in rates:
            raise ValueError(f"there is no published rate of {limit} for {self._gpu.name}")
        per_clock = rates[limit].per_second / (self._clock * self._gpu.sms * _SCHEDULERS)
        return amount / per_clock

    @property
    def multiprocessor(self) -> Any:
        """What the executor is told of it."""
        if "L2 reads" not in self._gpu.rates:
            raise ValueError(f"there is no published rate of L2 reads for {self._gpu.name}")
        share = self._gpu.rates["L2 reads"].per_second / (self._clock * self._gpu.sms)
        known = self._known
        return executor().Multiprocessor(
            _SCHEDULERS, share, known.branch_latency, known.barrier_latency, known.block_latency
        )

    def instruction(self, code: Sass) -> Any:
        """What the executor is told of an instruction."""
        pipe, effect, occupied, latency, moved = self._cost(code)
        groups = 0
        if effect == "wait":
            groups = int(code.text.rpartition(",")[2].strip(), 16)
        return executor().ReplayInstruction(
            _PIPES.index(pipe),
            _EFFECTS.index(effect),
            occupied,
            latency,
            moved,
            groups,
            list(code.reads),
            list(code.writes),
        )

    def _cost(self, code: Sass) -> tuple[str, str, float, float, float]:
        """Pipe, effect, cycles of the pipe, latency, bytes to or from L2."""
        known, opcode = self._known, code.opcode
        if code.predicate == "!PT":
            return "none", "none", 0, 0, 0
        if opcode in ("BRA", "EXIT", "CALL", "RET", "BSYNC"):
            return "none", "branch", 0, 0, 0
        if opcode == "BAR":
            return "none", "barrier", 0, 0, 0
        if opcode == "LDGDEPBAR":
            return "none", "commit", 0, 0, 0
        if opcode == "DEPBAR" and code.text.startswith("DEPBAR.LE SB0,"):
            return "none", "wait", 0, 0, 0
        if opcode in ("HMMA", "IMMA"):
            return self._tensor(code)
        if opcode in ("LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL", "SHFL"):
            return self._memory(code)
        if opcode in _FMA:
            return "fma", "none", self._cycles("fp32", _LANES), known.arithmetic_latency, 0
        if opcode in _SPECIAL:
            occupied = self._cycles("special function", _LANES)
            return "special", "none", occupied, known.special_latency, 0
        occupied = _LANES * _SCHEDULERS / known.alu_lanes
        if opcode.startswith("U"):
            return "uniform", "none", occupied, known.uniform_latency, 0
        return "alu", "none", occupied, known.arithmetic_latency, 0

    def _tensor(self, code: Sass) -> tuple[str, str, float, float, float]:
        shape = code.mma_shape
        if shape is None:
            raise ValueError(f"there is no published rate of {code.text}")
        kind = next((t.lower() for t in code.modifiers if t in ("BF16", "TF32")), "f16")
        if code.opcode == "IMMA":
            kind = "s8"
        elif kind == "f16" and "F32" not in code.modifiers:
            kind = "f16 into f16"
        deep = shape[2] >= (8 if kind == "tf32" else 16)
        latency = self._known.tensor_latency_k16 if deep else self._known.tensor_latency_k8
        return "tensor", "none", self._cycles(f"tensor {kind}", 2 * math.prod(shape)), latency, 0

    def _memory(self, code: Sass) -> tuple[str, str, float, float, float]:
        known, counts, line = self._known, self._counts, code.line
        # What was counted of its PTX instruction; without bank conflicts where that is unknown, as
        # for spilled registers.
        wavefronts = counts.each("wavefronts", line) or float(code.words)
        moved = counts.each("sectors", line) * _SECTOR
        if code.opcode == "SHFL":
            return "memory", "none", _LANES / known.shuffle_lanes, known.shared_latency, 0
        if code.opcode in ("LDL", "STL"):
            return "memory", "none", code.words, known.l1_latency, 0
        if code.opcode == "LDGSTS":
            occupied = max(wavefronts, moved / _L1_BYTES)
            return "memory", "copy", occupied, known.global_latency, moved
        if code.opcode == "LDG":
            past_l1 = moved * counts.share_past_l1
            return "memory", "load", max(1.0, moved / _L1_BYTES), known.global_latency, past_l1
        if code.opcode == "STG":
            return "memory", "store", max(1.0, moved / _L1_BYTES), 0, moved
        return "memory", "none", wavefronts, known.shared_latency, 0


def _run(
    machine: _Machine,
    code: Sequence[Sass],
    trace: npt.NDArray[np.uint32],
    warps: int,
    resident: int,
    blocks: int,
) -> tuple[float, float]:
    """Cycles that a multiprocessor takes for its blocks, and for one more where there are many."""
    instructions = [machine.instruction(instruction) for instruction in code]
    replayed = min(blocks, _ROUNDS * resident)
    ends = executor().replay(
        instructions, trace, machine.multiprocessor, warps, min(resident, blocks), replayed
    )
    if replayed <= resident:
        return ends[-1], ends[-1] / replayed
    # Blocks end at a steady rate once the first round is over.
    settled = len(ends) // 2
    each = (ends[-1] - ends[settled - 1]) / (len(ends) - settled)
    return ends[-1] + each * (blocks - replayed), each
