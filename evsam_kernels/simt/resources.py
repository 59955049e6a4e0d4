"""What a kernel takes of a multiprocessor, and what its machine code consists of."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from evsam_kernels.simt import toolchain
from evsam_kernels.simt.compile import TritonModule
from evsam_kernels.simt.module import Module


@dataclass(frozen=True)
class Resources:
    """What NVIDIA's assembler made of one kernel.

    Attributes:
        registers: per thread.
        spill_stores: bytes per thread that it stores for want of registers; None where only the
            machine code is known, which does not tell them from arrays in local memory.
        spill_loads: bytes per thread that it loads back; None as above.
        stack: bytes of local memory per thread, spilled registers and arrays.
        shared: bytes of static shared memory per block; dynamic memory is the launch's.
        barriers: barriers that a block uses; None as above.
        opcodes: instructions by mnemonic without modifiers, such as "HMMA", "LDGSTS" or "FFMA".
    """

    registers: int
    spill_stores: int | None
    spill_loads: int | None
    stack: int
    shared: int
    barriers: int | None
    opcodes: dict[str, int]

    @property
    def instructions(self) -> int:
        """Instructions of the machine code, without the padding behind it."""
        return sum(self.opcodes.values())


def assemble(
    module: Module,
    arch: int | None = None,
    *,
    kernel: str | None = None,
    ptx_lines: bool = False,
) -> tuple[bytes, str]:
    """Assemble a module's PTX with ptxas.

    Args:
        module: what to assemble.
        arch: compute capability, 90 for sm_90; the one that it was compiled for where None.
        kernel: the only one to assemble; all where None.
        ptx_lines: whether the machine code's line information names the lines of the PTX, and not
            those of the source that it was compiled from.

    Returns:
        the cubin, and what ptxas reports of it.

    Raises:
        ToolNotFoundError: ptxas is not installed.
        ToolError: ptxas refuses the PTX.
    """
    target = module.target if arch is None else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text = _with_own_lines(module, kernel) if ptx_lines else module.ptx
        ptx.write_text(text, encoding="utf-8")
        log = toolchain.run(
            "ptxas",
            [
                *("-v", "-lineinfo", f"-arch={target}", ptx, "-o", cubin),
                *(() if kernel is None else ("--entry", kernel)),
            ],
            # Triton is released with the assembler that it calls.
            prefer="triton" if isinstance(module, TritonModule) else None,
        )
        return cubin.read_bytes(), log


def resources(
    code: Module | bytes | Path, arch: int | None = None, *, log: str = "", listing: str = ""
) -> dict[str, Resources]:
    """What every kernel of a module, or of a cubin, takes.

    Args:
        code: a module, which is assembled; or a cubin, as bytes or as a file.
        arch: compute capability to assemble a module for; its own where None.
        log: what ptxas reported of a cubin, where that is known.
        listing: what nvdisasm prints of the cubin's code, where that is known.

    Returns:
        resources by the kernels' names.

    Raises:
        ToolNotFoundError: ptxas (for a module), cuobjdump (for a cubin) or nvdisasm is not
            installed.
        ToolError: they refuse the code.
    """
    if isinstance(code, Module):
        cubin, log = assemble(code, arch)
    else:
        cubin = code.read_bytes() if isinstance(code, Path) else code
    figures = _figures_of_ptxas(log)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        if not figures:
            figures = _figures_of_cuobjdump(toolchain.run("cuobjdump", ["-res-usage", path]))
        listing = listing or toolchain.run("nvdisasm", ["-c", path])
    opcodes = _opcodes(listing)
    return {
        kernel: Resources(
            registers=found["registers"],
            spill_stores=found.get("spill_stores"),
            spill_loads=found.get("spill_loads"),
            stack=found["stack"],
            shared=found["shared"],
            barriers=found.get("barriers"),
            opcodes=opcodes[kernel],
        )
        for kernel, found in figures.items()
    }


def _with_own_lines(module: Module, kernel: str | None) -> str:
    """The PTX with line information that names its own lines, for a kernel or all."""
    lines = {
        instruction.ptx_line
        for each in module.kernels
        if kernel in (None, each.name)
        for instruction in module.instructions(each.name)
    }
    text = []
    for number, line in enumerate(module.ptx.splitlines(), 1):
        words = line.split(maxsplit=1)
        if words and words[0] == ".section":
            break  # What debuggers are told comes last.
        if words and words[0] in (".loc", ".file"):
            continue
        # The end of a kernel counts as an instruction of its first line.
        if number in lines and not line.startswith("."):
            text.append(f".loc 1 {number} 0")
        text.append(line)
    return "\n".join([*text, '.file 1 "kernel.ptx"', ""])


_PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>[^']+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads\s*"
    r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<more>[^\n]*(?:\n\s+,[^\n]*)*)",
    re.DOTALL,
)


def _figures_of_ptxas(log: str) -> dict[str, dict[str, int]]:
    figures = {}
    for entry in _PTXAS_ENTRY.finditer(log):
        names = ("registers", "stack", "spill_stores", "spill_loads")
        found = {name: int(entry[name]) for name in names}
        # ptxas leaves out what a kernel does not use.
        for name, pattern in (("shared", r"(\d+) bytes smem"), ("barriers", r"used (\d+) barrier")):
            match = re.search(pattern, entry["more"])
            found[name] = int(match[1]) if match else 0
        figures[entry["kernel"]] = found
    return figures


_CUOBJDUMP_ENTRY = re.compile(
    r"Function (?P<kernel>\S+):\s*REG:(?P<registers>\d+) STACK:(?P<stack>\d+) "
    r"SHARED:(?P<shared>\d+)"
)


def _figures_of_cuobjdump(listing: str) -> dict[str, dict[str, int]]:
    return {
        entry["kernel"]: {name: int(entry[name]) for name in ("registers", "stack", "shared")}
        for entry in _CUOBJDUMP_ENTRY.finditer(listing)
    }


_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")


def _opcodes(listing: str) -> dict[str, dict[str, int]]:
    """Mnemonics of every function in what nvdisasm prints."""
    counted: dict[str, Counter[str]] = {}
    function = ""
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            function = section[1]
            counted[function] = Counter()
        elif function and (instruction := _INSTRUCTION.match(line)):
            counted[function][instruction[1]] += 1
    # The loop behind the end, and what aligns it, never run.
    return {
        function: {name: number for name, number in sorted(opcodes.items()) if name != "NOP"}
        for function, opcodes in counted.items()
    }
