"""Lower bounds: what a launch must take on a GPU, from what was counted and what is published.

Every term divides work that cannot be avoided by the highest rate that NVIDIA publishes for it, as
if everything else were free, so that the launch cannot be faster than the largest term. None of it
is a time. Where a term could claim too much, it claims less:

- Only instructions that the assembler cannot drop count for issue slots and the FP32 pipe: moves,
  integer arithmetic and conversions do not, and a multiplication may become part of an addition.
- A warp's instruction takes its pipe for all 32 lanes, as the CUDA guide defines throughput.
- Work inside multiprocessors is spread over blocks evenly, and the busiest multiprocessor has
  ceil(blocks / multiprocessors) of them. Blocks are taken to do equal work.
- A load that may hit in L1 counts no L2 reads, but each byte must be read from L2 once.
- DRAM moves each byte once that the launch reads, and once that it writes: caches start out empty
  and end up written back.

Of a launch that was only sampled, every count is scaled by its blocks over those that ran. So are
the bytes of a buffer that it reads or writes, up to the buffer's size; where it reads part of a
buffer, what neighbouring blocks share counts twice, so that the bound is itself an estimate there.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from evsam_kernels.simt.gpus import Gpu, Rate, gpu
from evsam_kernels.simt.report import Report

_LANES = 32
_SECTOR = 32
_INSIDE_MULTIPROCESSORS = ("tensor ", "fp32", "special function", "issue", "shared memory")

_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
_SPECIAL = {"ex2", "lg2", "sin", "cos", "rcp", "rsqrt", "sqrt", "tanh", "div"}
_ISSUED = {
    *("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix"),
    *("shfl", "vote", "match", "redux", "bar", "barrier", "activemask"),
}
_FP32 = {
    **{"mul": "multiply", "add": "add", "sub": "add"},
    **{"fma": "multiply-add", "mad": "multiply-add"},
}
_MMA_TYPES = {
    *("f16", "bf16", "tf32", "f32", "f64", "e4m3", "e5m2"),
    *("b1", "s4", "u4", "s8", "u8", "s32"),
}
_INTEGERS = {"s16", "u16", "s32", "u32", "s64", "u64"}
_PAST_L1 = {"cg", "cv", "volatile", "relaxed", "acquire", "mmio"}


@dataclass(frozen=True)
class Work:
    """What a launch must do.

    Attributes:
        blocks: blocks of the grid.
        amounts: what must be done of each thing that a `Gpu` has a rate for, in that rate's unit.
    """

    blocks: int
    amounts: dict[str, float]

    @staticmethod
    def of(report: Report) -> Work:
        """The work that a launch was counted to do.

        Raises:
            ValueError: the launch was not checked, so that its memory traffic is unknown.
        """
        if not report.checked:
            raise ValueError("report must be that of a checked launch: launch it with check=True")
        amounts: defaultdict[str, float] = defaultdict(float)
        past_l1 = 0.0
        for index, instruction in enumerate(report.instructions):
            opcode, *modifiers = _opcode(instruction.text)
            executions = float(report.counters["warp_executions"][index])
            limit, operations = _use(opcode, modifiers)
            amounts[limit] += operations * executions
            if limit.startswith("tensor ") or limit == "special function":
                amounts["issue"] += executions
            amounts["shared memory"] += float(report.counters["wavefronts"][index])
            if opcode in ("ld", "cp") and _PAST_L1 & {*modifiers}:
                past_l1 += _SECTOR * float(report.counters["sectors"][index])
        multiplications, additions = amounts.pop("multiply", 0.0), amounts.pop("add", 0.0)
        fp32 = amounts.pop("multiply-add", 0.0) + max(multiplications, additions)
        amounts["fp32"] = _LANES * fp32
        amounts["issue"] += fp32
        amounts["L2 reads"] = past_l1
        blocks = math.prod(report.grid)
        scale = blocks / len(report.blocks_run)
        amounts = defaultdict(float, {limit: scale * amount for limit, amount in amounts.items()})
        read, written = (
            sum(
                min(scale * moved[side], max(report.buffer_bytes.get(name, 0), moved[side]))
                for name, moved in report.unique_bytes.items()
            )
            for side in (0, 1)
        )
        amounts["L2 reads"] = max(amounts["L2 reads"], read)
        amounts["DRAM"] = read + written
        return Work(
            blocks, {limit: amount for limit, amount in amounts.items() if limit and amount}
        )


def _use(opcode: str, modifiers: list[str]) -> tuple[str, float]:
    """What one execution by a warp uses up, and how much; "" for what the assembler may drop.

    FP32 arithmetic comes as "multiply", "add" and "multiply-add", as the assembler may fuse it.
    """
    if opcode == "mma" and "sp" not in modifiers:
        return _tensor(modifiers)
    if opcode in _SPECIAL and not _INTEGERS & {*modifiers}:
        return "special function", _LANES
    if opcode in _FP32 and modifiers[-1] == "f32":
        return _FP32[opcode], 1
    if opcode in _ISSUED and not {"param", "const", "local"} & {*modifiers}:
        return "issue", 1
    return "", 0


def _opcode(text: str) -> list[str]:
    """The parts of an instruction's opcode: ["ld", "global", "v4", "b32"]."""
    words = text.split()
    word = words[1] if words[0].startswith("@") else words[0]
    return word.rstrip(";").replace("::", ".").split(".")


def _tensor(modifiers: list[str]) -> tuple[str, float]:
    """Which rate limits an mma, and how many operations one warp's execution is."""
    shape = next(match for match in map(_SHAPE.fullmatch, modifiers) if match)
    operations = 2.0 * math.prod(map(int, shape.groups()))
    # The types of D, A, B and C come last.
    into, kind = [part for part in modifiers if part in _MMA_TYPES][-4:-2]
    if (kind, into) == ("f16", "f16"):
        return "tensor f16 into f16", operations
    return f"tensor {'s8' if kind == 'u8' else kind}", operations


@dataclass(frozen=True)
class Term:
    """What one published rate says.

    Attributes:
        limit: what is limited, such as "tensor", "shared memory" or "DRAM".
        seconds: no launch takes less.
        amount: what must be done, in the rate's unit.
        rate: the published rate.
    """

    limit: str
    seconds: float
    amount: float
    rate: Rate


@dataclass(frozen=True)
class Bound:
    """A lower bound: not a time, but what no time can be less than.

    Attributes:
        gpu: where.
        work: what must be done.
        terms: the largest first.
        uncounted: what the launch does and the GPU has no published rate for.
    """

    gpu: Gpu
    work: Work
    terms: tuple[Term, ...]
    uncounted: tuple[str, ...]

    @property
    def binding(self) -> Term | None:
        """The largest term; None where nothing was counted."""
        return self.terms[0] if self.terms else None

    @property
    def seconds(self) -> float:
        """No launch takes less; 0 where nothing was counted."""
        return self.terms[0].seconds if self.terms else 0.0

    def __str__(self) -> str:
        binding = self.binding
        if binding is None:
            return f"{self.gpu.name}: no bound, as nothing was counted"
        return (
            f"{self.gpu.name}: at least {1e6 * self.seconds:.3g} us, bound by {binding.limit} "
            f"({binding.amount:.4g} {binding.rate.unit} in {self.work.blocks} blocks, at "
            f"{binding.rate.derivation})"
        )


def bound(launch: Report | Work, on: str | Gpu = "a100-40gb") -> Bound:
    """What a launch takes on a GPU at least.

    Args:
        launch: the report of a checked launch, or its work.
        on: the GPU, one of `GPUS` or its key.

    Raises:
        ValueError: there is no such GPU, or the launch was not checked.
    """
    work = Work.of(launch) if isinstance(launch, Report) else launch
    where = gpu(on) if isinstance(on, str) else on
    # The share of the work that the busiest multiprocessor has, over an even share.
    uneven = math.ceil(work.blocks / where.sms) * where.sms / work.blocks
    terms: list[Term] = []
    tensor: list[Term] = []
    for limit, amount in work.amounts.items():
        if limit not in where.rates:
            continue
        rate = where.rates[limit]
        seconds = amount / rate.per_second
        if limit.startswith(_INSIDE_MULTIPROCESSORS):
            seconds *= uneven
        (tensor if limit.startswith("tensor ") else terms).append(
            Term(limit, seconds, amount, rate)
        )
    if tensor:
        # One pipe does all of them, one after the other.
        most = max(tensor, key=lambda term: term.seconds)
        terms.append(Term(most.limit, sum(t.seconds for t in tensor), most.amount, most.rate))
    return Bound(
        where,
        work,
        tuple(sorted(terms, key=lambda term: -term.seconds)),
        tuple(limit for limit in work.amounts if limit not in where.rates),
    )
