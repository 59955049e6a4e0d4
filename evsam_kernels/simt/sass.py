"""Reads machine code as nvdisasm prints it: instructions, registers, branches, loops."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r"^\s*//## File \"[^\"]*\", line (\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([^;]*?)\s*;")
_OPERAND = re.compile(r",(?![^\[]*\])")
_REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)(\.64)?\b")
_TARGET = re.compile(r"`\((\.L_\w+)\)")

_FIRST = {"R": 0, "UR": 256, "P": 320, "UP": 328}
"""Where the registers of each file begin when all are numbered in a row."""

_WITHOUT_RESULT = {
    *("STG", "STS", "STL", "ST", "RED", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BAR", "MEMBAR", "NOP"),
    *("BRA", "BRX", "EXIT", "BSSY", "BSYNC", "BMOV", "WARPSYNC", "CALL", "RET", "BPT", "CCTL"),
    *("ERRBAR", "NANOSLEEP", "YIELD", "STSM", "UTMALDG", "SYNCS"),
}
_MMA_SHAPE = re.compile(r"\.(16|8)(8)(4|8|16|32|64)\b")


@dataclass(frozen=True)
class Sass:
    """One instruction of the machine code.

    Attributes:
        address: in bytes from the kernel's start.
        text: without predicate.
        line: that the line information names; 0 for none.
        opcode: such as "HMMA".
        modifiers: such as ("16816", "F32").
        predicate: register of the predicate, such as "P0"; "" without one and for "PT", "!PT" for
            an instruction that never does anything.
        reads, writes: registers, numbered over all register files.
        target: address that it may branch to, or None.
    """

    address: int
    text: str
    line: int
    opcode: str
    modifiers: tuple[str, ...]
    predicate: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    target: int | None

    @property
    def conditional(self) -> bool:
        """Whether a branch or an exit may go on behind it instead."""
        operands = self.text.partition(" ")[2]
        return bool(self.predicate) or bool(re.match(r"!?U?P\d|~?U?R", operands))

    @property
    def mma_shape(self) -> tuple[int, int, int] | None:
        """M, N and K of a matrix product."""
        found = _MMA_SHAPE.search(self.text)
        return (int(found[1]), int(found[2]), int(found[3])) if found else None

    @property
    def words(self) -> int:
        """32-bit registers that an access moves per lane."""
        return next((int(m) // 32 for m in self.modifiers if m in ("64", "128")), 1)


def read(listing: str, kernel: str) -> list[Sass]:
    """The instructions of a kernel in what `nvdisasm -c -g` prints, without the padding behind.

    Raises:
        ValueError: the listing has no such kernel.
    """
    labels: dict[str, int] = {}
    found: list[tuple[int, str, str, int]] = []
    pending: list[str] = []
    inside = False
    line = 0
    for text in listing.splitlines():
        if section := _SECTION.match(text):
            inside = section[1] == kernel
        elif not inside:
            continue
        elif label := _LABEL.match(text):
            pending.append(label[1])
        elif number := _LINE.match(text):
            line = int(number[1])
        elif instruction := _INSTRUCTION.match(text):
            address = int(instruction[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            predicate = "" if instruction[3] in (None, "PT", "UPT") else instruction[3]
            if instruction[2] and instruction[3] in ("PT", "UPT"):
                predicate = "!PT"
            found.append((address, predicate, instruction[4], line))
    if not found:
        raise ValueError(f"the machine code has no kernel {kernel!r}")
    while found[-1][2] == "NOP":
        found.pop()
    return [decode(*entry, labels) for entry in found]


def decode(
    address: int, predicate: str, text: str, line: int = 0, labels: dict[str, int] | None = None
) -> Sass:
    """One instruction, from its text without the predicate."""
    word, _, rest = text.partition(" ")
    opcode, *modifiers = word.split(".")
    operands = [operand.strip() for operand in _OPERAND.split(rest)] if rest else []
    results = 0
    if opcode not in _WITHOUT_RESULT:
        # A predicate beside the result, in front of it or behind it, is a result too.
        pair = len(operands) > 1 and any(re.match(r"U?P(\d|T)", part) for part in operands[:2])
        results = 2 if pair else min(1, len(operands))
    writes: list[int] = []
    for operand in operands[:results]:
        writes += _registers(operand, _result_words(opcode, modifiers))
    reads: list[int] = []
    sources = operands[results:]
    for position, operand in enumerate(sources):
        reads += _registers(operand, _source_words(opcode, modifiers, position, operand))
    if predicate and predicate != "!PT":
        reads += _registers(predicate, 1)
    target = _TARGET.search(rest)
    return Sass(
        address,
        text,
        line,
        opcode,
        tuple(modifiers),
        predicate,
        tuple(reads),
        tuple(writes),
        labels.get(target[1]) if target and labels and opcode in ("BRA", "CALL") else None,
    )


def _registers(operand: str, words: int) -> list[int]:
    """The registers an operand names; `words` of them in a row where it is one 32-bit register."""
    found: list[int] = []
    for file, number, wide in _REGISTER.findall(operand):
        count = 2 if wide else words if file in ("R", "UR") and "[" not in operand else 1
        first = _FIRST[file] + int(number)
        found += range(first, first + count)
    return found


def _result_words(opcode: str, modifiers: Sequence[str]) -> int:
    if opcode in ("HMMA", "IMMA"):
        return 4 if "F32" in modifiers or opcode == "IMMA" else 2
    if opcode == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if opcode.startswith(("LD", "ATOM")):
        return next((int(m) // 32 for m in modifiers if m in ("64", "128")), 1)
    return 2 if "WIDE" in modifiers or opcode in ("DADD", "DMUL", "DFMA") else 1


def _source_words(opcode: str, modifiers: Sequence[str], position: int, operand: str) -> int:
    if opcode in ("HMMA", "IMMA") and modifiers:
        deep = modifiers[0] in ("16816", "16832", "16864") or (
            modifiers[0] == "1688" and "TF32" in modifiers
        )
        accumulator = 4 if "F32" in modifiers or opcode == "IMMA" else 2
        return ((4 if deep else 2), (2 if deep else 1), accumulator)[position]
    if opcode in ("STG", "STS", "STL", "ST") and "[" not in operand:
        return next((int(m) // 32 for m in modifiers if m in ("64", "128")), 1)
    if "WIDE" in modifiers and position == 2:
        return 2
    return 2 if opcode in ("DADD", "DMUL", "DFMA") else 1


@dataclass(frozen=True)
class BasicBlock:
    """Instructions that run one after the other.

    Attributes:
        instructions: indices, first and behind the last.
        successors: the blocks that may follow; an empty one where the kernel may end, -1.
    """

    instructions: range
    successors: tuple[int, ...]


EXIT = -1


def basic_blocks(code: Sequence[Sass]) -> list[BasicBlock]:
    """The control flow of a kernel.

    A call of what returns is taken to return at once: the slow ways of divisions and the like. What
    does not return is jumped to, as the assembler does where a branch would not reach.

    Raises:
        ValueError: a branch whose target is computed.
    """
    index_of = {instruction.address: index for index, instruction in enumerate(code)}
    jumps = {
        index: index_of[instruction.target]
        for index, instruction in enumerate(code)
        if instruction.target is not None
        and not (instruction.opcode == "CALL" and _returns(code, index_of[instruction.target]))
    }
    starts = {0}
    for index, instruction in enumerate(code):
        if instruction.opcode in ("BRX", "JMX"):
            raise ValueError(f"the machine code has a computed branch: {instruction.text}")
        if index in jumps:
            starts.add(jumps[index])
        if index in jumps or instruction.opcode in ("BRA", "EXIT", "RET"):
            starts.add(index + 1)
    ordered = sorted(start for start in starts if start < len(code))
    number = {start: block for block, start in enumerate(ordered)}
    blocks = []
    for start, end in zip(ordered, [*ordered[1:], len(code)], strict=True):
        last = code[end - 1]
        following = number.get(end, EXIT)
        successors: list[int] = []
        if end - 1 in jumps:
            successors.append(number[jumps[end - 1]])
            if last.conditional and last.predicate != "!PT":
                successors.append(following)
        elif last.opcode in ("EXIT", "RET"):
            successors.append(EXIT)
            if last.predicate:
                successors.append(following)
        else:
            successors.append(following)
        blocks.append(BasicBlock(range(start, end), tuple(dict.fromkeys(successors))))
    return blocks


def _returns(code: Sequence[Sass], start: int) -> bool:
    """Whether what begins at an index is a function that returns."""
    ends = (c.opcode for c in code[start:] if c.opcode in ("EXIT", "RET") and not c.predicate)
    return next(ends, "") == "RET"


def loops(blocks: Sequence[BasicBlock]) -> list[tuple[int, int]]:
    """First and last block of every loop, the innermost first."""
    last_of: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for successor in block.successors:
            if successor != EXIT and successor <= number:
                last_of[successor] = max(last_of.get(successor, 0), number)
    return sorted(last_of.items(), key=lambda loop: loop[1] - loop[0])
