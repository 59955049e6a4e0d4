"""What a launch in the executor did: faults, counters of instructions, totals by source line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Index = tuple[int, int, int]

# The shape and the types of a matrix product.
_MMA = re.compile(r"\bmma\..*?\.(m\d+n\d+k\d+)\S*?((?:\.[a-z]+\d+){4})(?=[.\s])")


class FaultError(Exception):
    """A kernel did something that a GPU does not define or forbids; see `report`."""

    def __init__(self, report: Report) -> None:
        super().__init__("\n".join([f"the kernel {report.kernel} has faults:", *report.problems()]))
        self.report = report


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        text: as the PTX has it.
        ptx_line: its line there.
        file, line: the source line it comes from, followed out of functions that were inlined from
            other files; "" and 0 where the PTX does not say (compile with -lineinfo).
        kind: what it is: "global load", "global store", the same for "shared", "local" and
            "generic", "constant load", "parameter load", "atomic", "async copy", "matrix load",
            "matrix store", "mma", "fp32", "fp16", "bf16", "fp64", "special", "integer", "convert",
            "compare", "select", "move", "shuffle", "vote", "barrier", "fence" or "control".
    """

    text: str
    ptx_line: int
    file: str
    line: int
    kind: str


@dataclass(frozen=True)
class Fault:
    """Something that an instruction did wrong: the first time, and how often.

    Attributes:
        kind: "out of bounds", "misaligned", "write to read-only memory", "race",
            "uninitialised read", "unfinished copy" (a read of cp.async data nobody waited for),
            "divergent barrier", "divergent synchronisation" (of the lanes of a warp), "undefined
            shuffle", "deadlock", "step limit", "trap" or "wild branch". The last four end the
            block.
        message: what happened, in words.
        instruction: which did it.
        block, thread: who did it.
        buffer, offset: where: a buffer of the launch, "shared" or "local", and bytes from its
            start; "" where no memory is involved.
        other_block, other_thread, other_instruction: the other side of a race, or None.
        count: how often this instruction did the same to this buffer, in all blocks.
    """

    kind: str
    message: str
    instruction: Instruction
    block: Index
    thread: Index
    buffer: str
    offset: int
    other_block: Index | None
    other_thread: Index | None
    other_instruction: Instruction | None
    count: int

    def __str__(self) -> str:
        text = f"{self.kind}: {self.message}\n    by thread {self.thread} of block {self.block}"
        text += f"\n    {_place(self.instruction)}"
        if self.other_thread is not None:
            text += f"\n    and thread {self.other_thread} of block {self.other_block}"
        if self.other_instruction is not None:
            text += f"\n    {_place(self.other_instruction)}"
        return text if self.count == 1 else f"{text}\n    {self.count} times in all"


def _place(instruction: Instruction) -> str:
    source = f"{instruction.file}:{instruction.line}, " if instruction.line else ""
    return f"at {source}PTX line {instruction.ptx_line}: {instruction.text}"


@dataclass(frozen=True)
class Line:
    """What the instructions of one source line were counted to do.

    Attributes:
        file, line: the source line; "" and 0 for instructions that come from none.
        counters: sums, named as in `Report.counters`.
        by_kind: the same for each kind of its instructions that were run.
        mma: executions of its matrix products by shape, as in `Report.mma`.
    """

    file: str
    line: int
    counters: Mapping[str, int]
    by_kind: Mapping[str, Mapping[str, int]]
    mma: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What one launch did.

    Attributes:
        kernel: its name.
        grid, block: number of blocks and of threads a block, along x, y and z.
        shared: bytes of dynamic shared memory a block.
        blocks_run: the blocks that ran, by linear index; all further figures are of these.
        checked: whether accesses were checked against each other; without that there are no
            counters of memory but `requests`, and `unique_bytes` is empty.
        faults: what went wrong, in the order of the instructions; empty for a clean kernel.
        instructions: of the kernel and of the functions that it calls.
        counters: for each instruction, arrays of uint64 `[len(instructions)]`:
            `warp_executions` and `lane_executions`; `requests` to memory, one a warp; `bytes` that
            the lanes asked for; `sectors` of 32 bytes that a request touches in global and local
            memory, and `ideal_sectors` that would hold the bytes; `wavefronts`, accesses of all
            banks of shared memory, and `ideal_wavefronts` without bank conflicts.
        buffer_bytes: size of each buffer; variables of the module are none.
        unique_bytes: for each buffer, the bytes that were read and written at least once: what has
            to move even if caches were perfect.
    """

    kernel: str
    grid: Index
    block: Index
    shared: int
    blocks_run: Sequence[int]
    checked: bool
    faults: tuple[Fault, ...]
    instructions: tuple[Instruction, ...]
    counters: Mapping[str, npt.NDArray[np.uint64]]
    buffer_bytes: Mapping[str, int]
    unique_bytes: Mapping[str, tuple[int, int]]

    @property
    def by_line(self) -> tuple[Line, ...]:
        """The counters summed over the instructions of each source line, in order."""
        indices: dict[tuple[str, int], list[int]] = {}
        for index, instruction in enumerate(self.instructions):
            indices.setdefault((instruction.file, instruction.line), []).append(index)
        return tuple(
            Line(file, line, self._sums(chosen), self._by_kind(chosen), self._mma(chosen))
            for (file, line), chosen in sorted(indices.items())
        )

    @property
    def by_kind(self) -> dict[str, dict[str, int]]:
        """The counters summed over the instructions of each kind that were run."""
        return self._by_kind(range(len(self.instructions)))

    @property
    def mma(self) -> dict[str, int]:
        """How often warps ran matrix products of each shape, such as "m16n8k16 f32.bf16.bf16.f32".

        The types are those of D, A, B and C in D = A B + C.
        """
        return self._mma(range(len(self.instructions)))

    def _sums(self, indices: Sequence[int]) -> dict[str, int]:
        return {name: int(counts[indices].sum()) for name, counts in self.counters.items()}

    def _by_kind(self, indices: Sequence[int]) -> dict[str, dict[str, int]]:
        kinds: dict[str, list[int]] = {}
        for index in self._run(indices):
            kinds.setdefault(self.instructions[index].kind, []).append(index)
        return {kind: self._sums(chosen) for kind, chosen in sorted(kinds.items())}

    def _mma(self, indices: Sequence[int]) -> dict[str, int]:
        shapes: dict[str, int] = {}
        for index in self._run(indices):
            found = _MMA.search(self.instructions[index].text)
            if found:
                shape = f"{found[1]} {found[2][1:]}"
                executions = int(self.counters["warp_executions"][index])
                shapes[shape] = shapes.get(shape, 0) + executions
        return dict(sorted(shapes.items()))

    def _run(self, indices: Sequence[int]) -> list[int]:
        """Those that were run at all."""
        return [index for index in indices if self.counters["warp_executions"][index]]

    def raise_for_faults(self) -> None:
        """Raise where there are faults.

        Raises:
            FaultError: with all of them in the message.
        """
        if self.faults:
            raise FaultError(self)

    def problems(self) -> list[str]:
        """Every fault, in words."""
        return [str(fault) for fault in self.faults]

    def __str__(self) -> str:
        lines = [f"{self.kernel}: grid {self.grid}, block {self.block}, {self.shared} B shared"]
        if len(self.blocks_run) < math.prod(self.grid):
            lines.append(f"only {len(self.blocks_run)} blocks were run")
        lines += self.problems() or (["no faults"] if self.checked else ["unchecked"])
        for kind, counted in self.by_kind.items():
            text = f"{kind:16} {counted['warp_executions']:>12,} warp instructions"
            if counted["bytes"]:
                text += f", {counted['bytes']:,} B"
            for name in ("sectors", "wavefronts"):
                if counted[name]:
                    text += f", {counted[name]:,} {name} (ideal {counted[f'ideal_{name}']:,})"
            lines.append(text)
        for shape, executions in self.mma.items():
            lines.append(f"mma {shape}: {executions:,}")
        for buffer, (read, written) in self.unique_bytes.items():
            lines.append(f"{buffer}: {read:,} B read and {written:,} B written at least once")
        return "\n".join(lines)
