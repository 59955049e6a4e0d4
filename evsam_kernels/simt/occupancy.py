"""How many blocks of a kernel a multiprocessor holds at once, and what keeps it from holding more.

The rules are those of NVIDIA's cuda_occupancy.h, which a test compiles and compares with.
"""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
_REGISTERS = 65536  # Of a multiprocessor.
_PARTITIONS = 4  # A multiprocessor's quarters: a warp lives in one and has its registers there.
_REGISTER_UNIT = 256  # What a warp's registers are rounded up to.
_SHARED_UNIT = 128  # What a block's shared memory is rounded up to, in bytes.
_SHARED_RESERVED = 1024  # Bytes per block that CUDA keeps for itself.
_MAX_THREADS_PER_BLOCK = 1024
_MAX_REGISTERS_PER_THREAD = 255


@dataclass(frozen=True)
class _Multiprocessor:
    warps: int
    blocks: int
    shared: int
    barriers: int | None
    """Shared by its blocks; None where NVIDIA's calculator sets them no limit."""


_MULTIPROCESSORS = {
    80: _Multiprocessor(warps=64, blocks=32, shared=164 * 1024, barriers=None),
    86: _Multiprocessor(warps=48, blocks=16, shared=100 * 1024, barriers=None),
    89: _Multiprocessor(warps=48, blocks=24, shared=100 * 1024, barriers=None),
    90: _Multiprocessor(warps=64, blocks=32, shared=228 * 1024, barriers=64),
    100: _Multiprocessor(warps=64, blocks=32, shared=228 * 1024, barriers=64),
    120: _Multiprocessor(warps=48, blocks=24, shared=100 * 1024, barriers=24),
}

ARCHITECTURES = tuple(_MULTIPROCESSORS)
"""Compute capabilities that are known, as in sm_80."""


@dataclass(frozen=True)
class Occupancy:
    """What one multiprocessor holds.

    Attributes:
        blocks: blocks at once; 0 where not even one fits.
        warps: warps at once.
        max_warps: warps that the multiprocessor has room for.
        limits: blocks that each resource alone would allow: "threads", "registers", "shared
            memory", "barriers", "blocks".
        limited_by: the resource that allows the fewest.
    """

    blocks: int
    warps: int
    max_warps: int
    limits: dict[str, int]
    limited_by: str

    @property
    def fraction(self) -> float:
        """Warps at once over those that there is room for, 0 to 1."""
        return self.warps / self.max_warps


def occupancy(
    arch: int, *, threads: int, registers: int, shared: int = 0, barriers: int = 1
) -> Occupancy:
    """How many blocks of a kernel one multiprocessor holds at once.

    Args:
        arch: compute capability, 80 for sm_80; one of `ARCHITECTURES`.
        threads: threads per block, 1 to 1024.
        registers: per thread, 0 to 255.
        shared: bytes per block, static and dynamic.
        barriers: barriers that a block uses, 0 to 16; `__syncthreads` alone is one.

    Raises:
        ValueError: an argument is outside of its range.
    """
    has = _multiprocessor(arch)
    for name, value, low, high in (
        ("threads", threads, 1, _MAX_THREADS_PER_BLOCK),
        ("registers", registers, 0, _MAX_REGISTERS_PER_THREAD),
        ("shared", shared, 0, None),
        ("barriers", barriers, 0, 16),
    ):
        if value < low or (high is not None and value > high):
            accepted = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"{name} must be {accepted}, got {value}")
    warps = _round_up(threads, _WARP) // _WARP
    limits = {
        "threads": has.warps // warps,
        "registers": _limit_of_registers(registers, warps, has.blocks),
        "shared memory": _limit_of_shared(shared, has.shared),
        "barriers": has.barriers // barriers if has.barriers and barriers else has.blocks,
        "blocks": has.blocks,
    }
    limited_by = min(limits, key=lambda resource: limits[resource])
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * warps, has.warps, limits, limited_by)


def max_shared(arch: int) -> int:
    """Bytes of shared memory that a block may have.

    Raises:
        ValueError: nothing is known of that architecture.
    """
    return _multiprocessor(arch).shared - _SHARED_RESERVED


def _multiprocessor(arch: int) -> _Multiprocessor:
    if arch not in _MULTIPROCESSORS:
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"arch must be one of {known}, got {arch!r}")
    return _MULTIPROCESSORS[arch]


def _limit_of_registers(registers: int, warps: int, max_blocks: int) -> int:
    if registers == 0:
        return max_blocks
    per_warp = _round_up(registers * _WARP, _REGISTER_UNIT)
    return _REGISTERS // _PARTITIONS // per_warp * _PARTITIONS // warps


def _limit_of_shared(shared: int, available: int) -> int:
    # One block may have all but what is reserved for it, which the division ensures.
    return available // _round_up(shared + _SHARED_RESERVED, _SHARED_UNIT)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
