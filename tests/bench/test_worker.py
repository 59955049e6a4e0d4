"""Worker processes: what they compute, how they are pinned, and how they fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.contestants import Contestant, Task
from bench.worker import ISA_ENVIRONMENTS, Gpu, Run, Worker, WorkerError, _Server
from evsam_kernels.numerics.plain import evaluate


class Noisy(nn.Module):
    """Doubles, and prints where the process's answers go."""

    def forward(self, x: Tensor) -> Tensor:
        os.write(1, b"not an answer\n")
        print("nor this", flush=True)
        return 2 * x


class Yielding(nn.Module):
    """Lets a thread of its own take its core, twenty times in a row."""

    def forward(self, x: Tensor) -> Tensor:
        rival = threading.Thread(target=lambda: [os.sched_yield() for _ in range(20)])
        rival.start()
        for _ in range(20):
            os.sched_yield()
        rival.join()
        return x


class Broken(nn.Module):
    """Raises an error of several lines."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("it is\n  broken")


class Deadly(nn.Module):
    """Ends the process."""

    def forward(self, x: Tensor) -> Tensor:
        os.write(2, b"first words\nlast words\n")
        os._exit(7)


class Mode(nn.Module):
    """Says whether it computes in inference mode, and whether its weights were made in that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([torch.is_inference_mode_enabled(), self.weight.is_inference()])


class Growing(nn.Module):
    """Takes as much memory again as the input."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1)[:, :1].clone()


class Environment(nn.Module):
    """Says what its process may use: numbers of its cores, then PyTorch's threads."""

    def forward(self, x: Tensor) -> Tensor:
        for name, value in ISA_ENVIRONMENTS["avx2"].items():
            assert os.environ[name] == value
        return torch.tensor([*sorted(os.sched_getaffinity(0)), torch.get_num_threads()])


CORE = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker("eager", (CORE,), "avx2")
    yield worker
    worker.close()


def task(
    module: nn.Module, folder: Path, inputs: tuple[Tensor, ...] = (torch.ones(1, 2, 1, 1),)
) -> Path:
    """A file with the task of computing this module."""
    path = folder / "task.pt"
    torch.save(Task(module.eval(), inputs, torch.float32), path)
    return path


def test_it_computes_and_times_the_task(worker: Worker, tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv, inputs = nn.Conv2d(4, 8, 3), (torch.randn(2, 4, 9, 9),)
    assert worker.prepare(task(conv, tmp_path, inputs)) == "channels last"
    torch.testing.assert_close(worker.output(), evaluate(conv, inputs, torch.float32))
    runs = worker.turn()
    assert len(runs) >= 3
    assert all(0 < run.seconds < 10 for run in runs)


def test_it_is_pinned_and_kept_to_the_instruction_set(worker: Worker, tmp_path: Path) -> None:
    worker.prepare(task(Environment(), tmp_path))
    assert worker.output().tolist() == [CORE, 1]


def test_weights_can_tell_that_they_are_unchanged(worker: Worker, tmp_path: Path) -> None:
    worker.prepare(task(Mode(), tmp_path))
    assert worker.output().tolist() == [True, False]


def test_memory_is_what_a_run_takes(worker: Worker, tmp_path: Path) -> None:
    x = torch.ones(1, 4096, 64, 64)
    worker.prepare(task(Growing(), tmp_path, (x,)))
    assert worker.memory() == pytest.approx(x.nbytes, rel=0.1)


def test_what_is_printed_is_no_answer(worker: Worker, tmp_path: Path) -> None:
    worker.prepare(task(Noisy(), tmp_path))
    assert worker.output().flatten().tolist() == [2, 2]
    assert worker.turn()


def test_runs_in_which_the_core_was_taken_away_are_marked(worker: Worker, tmp_path: Path) -> None:
    worker.prepare(task(Yielding(), tmp_path))
    assert any(run.preempted for run in worker.turn())


def test_an_error_is_one_line_and_the_next_task_runs(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^RuntimeError: it is broken$"):
        worker.prepare(task(Broken(), tmp_path))
    worker.prepare(task(Noisy(), tmp_path))
    assert worker.output().flatten().tolist() == [2, 2]


def test_a_process_that_dies_leaves_its_status_and_last_words(tmp_path: Path) -> None:
    worker = Worker("eager", (CORE,), "native")
    with pytest.raises(WorkerError, match=r"^its process ended with status 7: last words$"):
        worker.prepare(task(Deadly(), tmp_path))
    with pytest.raises(WorkerError, match="ended with status 7"):
        worker.turn()
    worker.close()


def test_closing_ends_the_process() -> None:
    worker = Worker("eager", (CORE,), "native")
    worker.close()
    assert worker._process.returncode == 0


class Cuda:
    """Stands in for torch.cuda, as far as times and memory go; notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.allocated = 5

    def Event(self, *, enable_timing: bool) -> Cuda:
        assert enable_timing
        return self

    def record(self) -> None:
        self.asked.append("record")

    def synchronize(self) -> None:
        self.asked.append("wait")

    def elapsed_time(self, end: Cuda) -> float:
        return 250.0

    def memory_allocated(self) -> int:
        return self.allocated

    def reset_peak_memory_stats(self) -> None:
        self.asked.append("reset")

    def max_memory_allocated(self) -> int:
        return 12

    def empty_cache(self) -> None:
        self.asked.append("empty")


@pytest.fixture
def gpu() -> Gpu:
    found = object.__new__(Gpu)
    found._cuda = Cuda()
    found._flushing = torch.ones(3, dtype=torch.uint8)
    return found


def test_a_run_on_a_gpu_lies_between_two_events_and_finds_no_cache(gpu: Gpu) -> None:
    def compute() -> None:
        assert not gpu._flushing.any()
        gpu._cuda.asked.append("compute")

    assert gpu.run(compute) == Run(0.25, False)
    assert gpu._cuda.asked == ["record", "compute", "record", "wait"]


def test_memory_on_a_gpu_is_the_peak_of_a_run(gpu: Gpu) -> None:
    assert gpu.memory() == 5
    assert gpu.peak_memory(lambda: gpu._cuda.asked.append("compute")) == 12
    assert gpu._cuda.asked == ["reset", "compute", "wait"]
    gpu.make_room()
    assert gpu._cuda.asked[-1] == "empty"


def several(task: Task) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A configuration, and one that fails."""
    yield "first", lambda: torch.ones(1)
    raise RuntimeError("no graph")


SEVERAL = {"several": Contestant(several, ("torch",))}


def test_what_the_configurations_before_a_failure_can_do_is_kept(tmp_path: Path) -> None:
    server = _Server(f"{__name__}:SEVERAL", "several")
    found = server.prepare(str(task(Noisy(), tmp_path)))
    assert found["configuration"] == (
        "first; the next configuration failed: RuntimeError: no graph"
    )
    server.output(str(tmp_path / "output.pt"))
    assert torch.load(tmp_path / "output.pt") == 1
