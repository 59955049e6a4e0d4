"""Run, check and count GPU kernels without a GPU: PTX, executed on the CPU warp by warp."""

from evsam_kernels.simt.bounds import Bound, Term, Work, bound
from evsam_kernels.simt.compile import TritonModule, compile_cuda, compile_triton
from evsam_kernels.simt.emulation import Emulation, Launch, emulate
from evsam_kernels.simt.gpus import GPUS, Gpu, Rate
from evsam_kernels.simt.module import Buffer, Kernel, Module, Parameter
from evsam_kernels.simt.occupancy import ARCHITECTURES, Occupancy, occupancy
from evsam_kernels.simt.replay import Estimate, ReplayError, replay
from evsam_kernels.simt.report import Fault, FaultError, Instruction, Line, Report
from evsam_kernels.simt.resources import Resources, assemble, resources
from evsam_kernels.simt.toolchain import ToolError, ToolNotFoundError

__all__ = [
    "ARCHITECTURES",
    "GPUS",
    "Bound",
    "Buffer",
    "Emulation",
    "Estimate",
    "Fault",
    "FaultError",
    "Gpu",
    "Instruction",
    "Kernel",
    "Launch",
    "Line",
    "Module",
    "Occupancy",
    "Parameter",
    "Rate",
    "ReplayError",
    "Report",
    "Resources",
    "Term",
    "ToolError",
    "ToolNotFoundError",
    "TritonModule",
    "Work",
    "assemble",
    "bound",
    "compile_cuda",
    "compile_triton",
    "emulate",
    "occupancy",
    "replay",
    "resources",
]
