"""Run, check and count GPU kernels without a GPU: PTX, executed on the CPU warp by warp."""

from evsam_kernels.simt.module import Buffer, Kernel, Module, Parameter
from evsam_kernels.simt.report import Fault, FaultError, Instruction, Line, Report

__all__ = [
    "Buffer",
    "Fault",
    "FaultError",
    "Instruction",
    "Kernel",
    "Line",
    "Module",
    "Parameter",
    "Report",
]
