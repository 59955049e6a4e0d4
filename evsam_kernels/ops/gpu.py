"""What the launchers of GPU kernels ask of the GPU, real or emulated, that a tensor is on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evsam_kernels.simt import emulation
from evsam_kernels.simt.gpus import GPUS
from evsam_kernels.simt.occupancy import max_shared


class Limits(NamedTuple):
    """What tile sizes depend on.

    Attributes:
        arch: compute capability, 80 for sm_80; 0 of other makers' GPUs.
        multiprocessors: how many there are.
        shared: bytes of shared memory that a block may have.
    """

    arch: int
    multiprocessors: int
    shared: int


def limits(tensor: Tensor) -> Limits:
    """The limits of the GPU that `tensor` is on, or of the one that is emulated."""
    emulated = emulation.current()
    if emulated is not None:
        gpu = next((gpu for gpu in GPUS.values() if gpu.arch == emulated.arch), None)
        return Limits(emulated.arch, gpu.sms if gpu else 108, max_shared(emulated.arch))
    properties = torch.cuda.get_device_properties(tensor.device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    arch = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Limits(
        arch, properties.multi_processor_count, shared or properties.shared_memory_per_block
    )
