"""One contestant in a process of its own, and the handle by which the benchmark drives it.

The process reads a JSON object a line and answers each with another: `{"do": "prepare", "task":
FILE}`, `{"do": "output", "to": FILE}`, `{"do": "turn"}`, `{"do": "memory"}`. It computes only when
asked and ends when its input does.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # The process pins itself before it imports PyTorch, which counts the cores.
    from torch import Tensor

ISA_ENVIRONMENTS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "EVSAM_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch, and what its compiler vectorises for
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",  # PyTorch and OpenVINO
        "OV_CPU_MAX_ISA": "AVX2",
    },
    "avx512": {
        "EVSAM_CPU_ISA": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v4",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "OV_CPU_MAX_ISA": "AVX512_CORE",
    },
}
"""How contestants are kept to an instruction set, which they look up when they start."""

_ROOT = Path(__file__).parents[1]
_RUNS = 3
"""At least so many are timed in a row."""
_SECONDS_A_TURN = 0.05
_SECONDS_A_TRIAL = 0.1
_SECONDS_TO_WARM_UP = 0.02
_SECONDS_OF_A_LONG_RUN = 5.0
"""Which is not repeated in a turn, nor warmed up for."""
"""Threads of the contestant before may still be looking for work."""


class Run(NamedTuple):
    """One run of a contestant.

    Attributes:
        seconds: what it took.
        preempted: whether the system gave a core of it to something else meanwhile.
    """

    seconds: float
    preempted: bool


class WorkerError(Exception):
    """A contestant failed; the message is what its process said."""


class Worker:
    """Runs one contestant in its process; close it at the end.

    Args:
        name: a key of `CONTESTANTS`.
        cores: numbers of the cores it may run on, with one thread each.
        isa: a key of `ISA_ENVIRONMENTS`.
        among: module and name of the contestants, if they are not `CONTESTANTS`.
    """

    def __init__(
        self,
        name: str,
        cores: tuple[int, ...],
        isa: str = "native",
        *,
        among: str = "bench.contestants:CONTESTANTS",
    ) -> None:
        self._name = name
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.worker"),
                *(among, name, *map(str, cores)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={
                **os.environ,
                **ISA_ENVIRONMENTS[isa],
                "OMP_NUM_THREADS": str(len(cores)),
                "KMP_BLOCKTIME": "10",  # Milliseconds that LLVM's OpenMP spins after a run.
                "PYTHONPATH": path,
            },
        )

    def prepare(self, task: Path) -> str:
        """Get ready for the `Task` in a file; returns the configuration that was the fastest.

        Raises:
            WorkerError: the contestant failed, here as in every other method.
        """
        configuration: str = self._ask(do="prepare", task=str(task))["configuration"]
        return configuration

    def output(self) -> Tensor:
        """What the task prepared for gives."""
        import torch

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "output.pt")
            self._ask(do="output", to=path)
            output: Tensor = torch.load(path)
            return output

    def turn(self) -> list[Run]:
        """A few runs in a row, after some that are not counted."""
        return [Run(*run) for run in self._ask(do="turn")["runs"]]

    def memory(self) -> int:
        """The most memory, in bytes, that a run takes beyond what the process had with the task."""
        taken: int = self._ask(do="memory")["bytes"]
        return taken

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._said.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # There will be no answer either.
        line = stdout.readline()
        if not line:
            self._said.seek(0)
            last = self._said.read().strip().splitlines()[-1:]
            status = self._process.wait()
            raise WorkerError(": ".join([f"its process ended with status {status}", *last]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


class _Server:
    """The process's side; every method answers one request."""

    def __init__(self, among: str, name: str) -> None:
        self._among = among
        self._name = name
        self._device: Cpu | Gpu = Cpu()
        self._candidates: list[tuple[str, Callable[[], Tensor]]] = []
        self._compute: Callable[[], Tensor]
        self._resident = 0
        self._takes_long = False

    def prepare(self, task: str) -> dict[str, Any]:
        import torch

        module, _, contestants = self._among.partition(":")
        contestant = getattr(importlib.import_module(module), contestants)[self._name]
        self._candidates.clear()  # Lets go of the task before.
        self._compute = lambda: torch.empty(0)
        lost = ""
        # Weights made in inference mode could not be packed once and for all.
        with torch.inference_mode(False), torch.no_grad():
            loaded = torch.load(task, weights_only=False)
            self._device = Cpu() if loaded.device == "cpu" else Gpu()
            try:
                self._candidates.extend(contestant.candidates(loaded))
            except Exception as error:
                if not self._candidates:
                    raise
                lost = f"; the next configuration failed: {_in_a_line(error)}"
        del loaded  # What the contestant has not taken of it.
        gc.collect()
        self._resident = self._device.memory()  # With the model, before its first run.
        seconds = [self._fastest_run(compute) for _, compute in self._candidates]
        configuration, self._compute = self._candidates[seconds.index(min(seconds))]
        self._takes_long = min(seconds) > _SECONDS_OF_A_LONG_RUN
        self._device.make_room()
        return {"configuration": configuration + lost}

    def output(self, to: str) -> dict[str, Any]:
        import torch

        torch.save(self._compute().cpu().clone(), to)
        return {}

    def turn(self) -> dict[str, Any]:
        if not self._takes_long:
            list(self._timed(self._compute, 1, _SECONDS_TO_WARM_UP))
        runs = list(self._timed(self._compute, _RUNS, _SECONDS_A_TURN))
        self._device.make_room()
        return {"runs": runs}

    def memory(self) -> dict[str, Any]:
        _, compute = self._candidates[0]  # Those after it may have memory of their own.
        return {"bytes": self._device.peak_memory(compute) - self._resident}

    def _fastest_run(self, compute: Callable[[], object]) -> float:
        """Of a few runs; of one where nothing is to be chosen or it takes long."""
        first = self._device.run(compute).seconds
        if len(self._candidates) == 1 or first > _SECONDS_OF_A_LONG_RUN:
            return first
        return min(run.seconds for run in self._timed(compute, _RUNS, _SECONDS_A_TRIAL))

    def _timed(self, compute: Callable[[], object], runs: int, seconds: float) -> Iterator[Run]:
        """At least `runs` runs, or one that takes long; and at least `seconds` together."""
        began = time.perf_counter()
        took = 0.0
        while (runs > 0 and took < _SECONDS_OF_A_LONG_RUN) or took < seconds:
            yield self._device.run(compute)
            runs -= 1
            took = time.perf_counter() - began


class Cpu:
    """Times and memory of this process."""

    def run(self, compute: Callable[[], object]) -> Run:
        """One run, by the wall clock."""
        switches = _preemptions()
        start = time.perf_counter()
        compute()
        end = time.perf_counter()
        return Run(end - start, _preemptions() > switches)

    def memory(self) -> int:
        """Bytes that the process has in use."""
        _trim()
        return _status("VmRSS")

    def peak_memory(self, compute: Callable[[], object]) -> int:
        """The most that it has during a run."""
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # The peak is that from now on.
        compute()
        return _status("VmHWM")

    def make_room(self) -> None:
        """Give back what is free: room for large maps that the system would have to clear."""
        _trim()


class Gpu:
    """Times and memory of the GPU, as PyTorch sees them."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        torch.backends.cudnn.benchmark = True  # PyTorch's own convolutions at their best.
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._flushing = torch.empty(2 * l2, dtype=torch.uint8, device="cuda")

    def run(self, compute: Callable[[], object]) -> Run:
        """One run, by events of its stream, with nothing of it in the L2 cache."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._flushing.zero_()
        start.record()
        compute()
        end.record()
        end.synchronize()
        return Run(start.elapsed_time(end) / 1000, False)

    def memory(self) -> int:
        """Bytes that tensors have."""
        allocated: int = self._cuda.memory_allocated()
        return allocated

    def peak_memory(self, compute: Callable[[], object]) -> int:
        """The most that they have during a run."""
        self._cuda.reset_peak_memory_stats()
        compute()
        self._cuda.synchronize()
        peak: int = self._cuda.max_memory_allocated()
        return peak

    def make_room(self) -> None:
        """Leave what is kept for later runs to the other contestants."""
        self._cuda.empty_cache()


def _trim() -> None:
    """Give the system back what is free in glibc's heap, which would hide what a run takes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _status(field: str) -> int:
    """Bytes that the process has in memory (VmRSS), or has had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _preemptions() -> int:
    """How often the system has taken a core from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _serve(among: str, name: str, *cores: str) -> None:
    os.sched_setaffinity(0, list(map(int, cores)))
    # Answers have stdout to themselves; what a library prints there goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(len(cores))
    server = _Server(among, name)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(server, request.pop("do"))(**request)
            except Exception as error:
                answer = {"error": _in_a_line(error)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
