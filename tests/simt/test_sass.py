"""Machine code is read as nvdisasm prints it: registers, branches, loops, lines."""

from __future__ import annotations

import pytest

from evsam_kernels.simt import sass
from evsam_kernels.simt.sass import EXIT, Sass

UNIFORM, PREDICATE = 256, 320


def decoded(text: str, predicate: str = "") -> Sass:
    return sass.decode(0, predicate, text)


@pytest.mark.parametrize(
    ("text", "writes", "reads"),
    [
        (
            "HMMA.16816.F32 R4, R8.reuse, R12, R16",
            range(4, 8),
            [8, 9, 10, 11, 12, 13, *range(16, 20)],
        ),
        ("HMMA.16816.F16 R4, R8, R12, R4", [4, 5], [8, 9, 10, 11, 12, 13, 4, 5]),
        ("HMMA.1688.F32 R4, R8, R12, RZ", range(4, 8), [8, 9, 12]),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", range(4, 8), [8, 9, 10, 11, 12, 13, *range(4, 8)]),
        ("LDG.E.128.CONSTANT R4, [R2.64+0x10]", range(4, 8), [2, 3]),
        ("LDSM.16.M88.4 R4, [R2+UR4]", range(4, 8), [2, UNIFORM + 4]),
        ("LDS.64 R4, [R2]", [4, 5], [2]),
        ("STG.E.64 [R2.64], R6", [], [2, 3, 6, 7]),
        ("LDGSTS.E.BYPASS.128 [R3], [R4.64], P0", [], [3, 4, 5, PREDICATE]),
        ("IMAD.WIDE R4, R3, R2, R6", [4, 5], [3, 2, 6, 7]),
        ("ISETP.GE.AND P1, PT, R3, c[0x0][0x160], P2", [PREDICATE + 1], [3, PREDICATE + 2]),
        ("IADD3 R4, P0, R2, R3, RZ", [4, PREDICATE], [2, 3]),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", [5], [4]),
        ("FFMA R4, -R5, |R6|, R7", [4], [5, 6, 7]),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", [], []),
    ],
)
def test_registers(text: str, writes: list[int], reads: list[int]) -> None:
    assert list(decoded(text).writes) == list(writes)
    assert list(decoded(text).reads) == list(reads)


def test_a_predicate_is_read() -> None:
    assert decoded("MOV R1, R2", "P3").reads == (2, PREDICATE + 3)
    assert decoded("MOV R1, R2", "!PT").reads == (2,)


def test_shapes_of_products_and_words_of_accesses() -> None:
    assert decoded("HMMA.16816.F32 R4, R8, R12, R4").mma_shape == (16, 8, 16)
    assert decoded("HMMA.1688.F32.TF32 R4, R8, R12, R4").mma_shape == (16, 8, 8)
    assert decoded("FADD R4, R8, R12").mma_shape is None
    assert (decoded("LDL.128 R4, [R1]").words, decoded("STL [R1], R4").words) == (4, 1)


LISTING = """
	.section	.text.other,"ax",@progbits
        /*0000*/                   EXIT ;
	.section	.text.kernel,"ax",@progbits
.text.kernel:
	//## File "kernel.ptx", line 7
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
	//## File "kernel.ptx", line 9 inlined at "kernel.ptx", line 2
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   CALL.REL.NOINC `(.L_x_3) ;
.L_x_2:
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/              @!P2 CALL.REL.NOINC `(.L_x_4) ;
        /*0070*/               @P3 EXIT ;
.L_x_4:
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   RET.REL.NODEC R2 `(kernel) ;
.L_x_5:
        /*00a0*/                   BRA `(.L_x_5);
        /*00b0*/                   NOP;
"""


def test_a_listing() -> None:
    code = sass.read(LISTING, "kernel")
    assert [instruction.opcode for instruction in code] == (
        ["MOV", "IADD3", "BRA", "CALL", "LDS", "BRA", "CALL", "EXIT", "EXIT", "RET", "BRA"]
    )
    assert [instruction.line for instruction in code[:3]] == [7, 9, 9]
    assert [code[4].predicate, code[5].predicate] == ["!PT", "P0"]
    assert code[5].target == 0x10
    with pytest.raises(ValueError, match="no kernel 'missing'"):
        sass.read(LISTING, "missing")


def test_control_flow() -> None:
    blocks = sass.basic_blocks(sass.read(LISTING, "kernel"))
    found = [(block.instructions.start, block.successors) for block in blocks]
    assert found == [
        (0, (1,)),
        (1, (3, 2)),
        (3, (3,)),  # The call returns: nothing is known of what it does.
        (4, (1, 4)),
        (6, (6, 5)),  # This one is a jump.
        (7, (EXIT, 6)),
        (8, (EXIT,)),
        (9, (EXIT,)),
        (10, (8,)),
    ]
    assert sass.loops(blocks) == [(8, 8), (1, 3)]


def test_computed_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="computed branch"):
        sass.basic_blocks([decoded("BRX R4 -0x20")])
