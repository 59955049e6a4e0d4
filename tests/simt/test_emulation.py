"""Triton kernels launched on CPU tensors run in the executor while an emulation is in force."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

import evsam_kernels as ek
from evsam_kernels import simt
from evsam_kernels.simt import emulation

triton = pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
tl = pytest.importorskip("triton.language")

SIZE = 64


@triton.jit
def scale(x, bias, y, n, factor, BLOCK: tl.constexpr, SHIFT: tl.constexpr = 0):
    """y = factor x + bias, where there is one; SHIFT moves the stores."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0) * factor
    if bias is not None:
        value += tl.load(bias + at, mask=at < n, other=0.0)
    tl.store(y + at + SHIFT, value, mask=at < n)


tuned = triton.autotune(
    [triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"], restore_value=["y"]
)(scale)
tuned_by_one = triton.autotune([triton.Config({"BLOCK": 32})], key=["n"])(scale)


def launch(x: torch.Tensor, y: torch.Tensor, n: int | None = None, **options: Any) -> None:
    n = x.numel() if n is None else n
    scale[(math.ceil(n / SIZE),)](x, None, y, n, 2.0, BLOCK=SIZE, **options)


@pytest.mark.parametrize("n", [1, 16, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("factor", [1, 3, 2.5])
def test_arguments_arrive_as_triton_specialises_them(
    n: int, with_bias: bool, factor: float
) -> None:
    x, y = torch.randn(128), torch.full((128,), 7.0)
    bias = torch.randn(128) if with_bias else None
    with simt.emulate() as found:
        scale[(2,)](x, bias, y, n, factor, BLOCK=SIZE, num_warps=2)
    want = x[:n] * factor + (0 if bias is None else bias[:n])
    torch.testing.assert_close(y[:n], want)
    assert (y[n:] == 7).all()
    (launched,) = found.launches
    assert (launched.report.kernel, launched.report.grid) == ("scale", (2, 1, 1))
    assert launched.report.block == (64, 1, 1)
    assert launched.report.unique_bytes["x"] == (4 * n, 0)
    assert launched.report.faults == ()


def test_launches_are_kept_in_order_and_empty_grids_are_none() -> None:
    x, y = torch.randn(256), torch.empty(256)
    with simt.emulate() as found:
        for n in (256, 64, 0, 128):
            launch(x, y, n)
    assert [launched.report.grid[0] for launched in found.launches] == [4, 1, 2]


def test_without_checks_nothing_is_counted() -> None:
    x, y = torch.randn(64), torch.empty(64)
    with simt.emulate(check=False, threads=1) as found:
        launch(x, y)
    torch.testing.assert_close(y, 2 * x)
    assert not found.launches[0].report.checked


def test_it_compiles_for_the_architecture_asked_for() -> None:
    x, y = torch.randn(64), torch.empty(64)
    for arch in (80, 89):
        with simt.emulate(arch) as found:
            launch(x, y)
        assert found.launches[0].module.target == f"sm_{arch}"
    with pytest.raises(ValueError, match="arch must be one of"), simt.emulate(75):
        launch(x, y)


def test_autotuning_has_no_times_to_choose_by() -> None:
    x, y = torch.randn(64), torch.empty(64)
    with simt.emulate(), pytest.raises(RuntimeError, match="one configuration"):
        tuned[(2,)](x, None, y, 64, 2.0)
    with simt.emulate():
        tuned_by_one[(2,)](x, None, y, 64, 2.0)
    torch.testing.assert_close(y, 2 * x)


def test_a_fault_raises_where_it_is_launched() -> None:
    x, y = torch.randn(64), torch.empty(64)
    with simt.emulate() as found:
        with pytest.raises(simt.FaultError, match="out of bounds") as raised:
            launch(x, y, SHIFT=1)
        assert found.launches == []
        launch(x, y)
    assert raised.value.report.faults[0].buffer == "y"
    assert len(found.launches) == 1


def test_what_nobody_wrote_must_not_be_read() -> None:
    x, y = torch.randn(64), torch.empty(64)
    with simt.emulate():
        scratch = emulation.unwritten(torch.empty(64))
        assert scratch.isnan().all()
        with pytest.raises(simt.FaultError, match="uninitialised read"):
            launch(scratch, y)
        scratch = emulation.unwritten(torch.empty(64))
        launch(x, scratch)
        launch(scratch, y)
    torch.testing.assert_close(y, 4 * x)


def test_what_is_only_written_in_part_must_not_be_read_by_the_same_launch() -> None:
    with simt.emulate(), pytest.raises(simt.FaultError, match="uninitialised read"):
        scratch = emulation.unwritten(torch.empty(64))
        launch(scratch, scratch, 32)


def test_outside_of_it_memory_is_left_alone() -> None:
    memory = torch.ones(4)
    assert emulation.unwritten(memory) is memory
    assert (memory == 1).all()


def test_outside_of_it_nothing_is_launched() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which Triton launches on")
    x, y = torch.randn(64), torch.empty(64)
    with simt.emulate():
        launch(x, y)
    with pytest.raises(RuntimeError, match="no GPU here"):
        launch(x, y)
    with pytest.raises(ZeroDivisionError), simt.emulate():
        raise ZeroDivisionError
    assert emulation.current() is None


def test_the_innermost_one_is_in_force() -> None:
    x, y = torch.randn(64), torch.empty(64)
    with simt.emulate() as outer:
        launch(x, y)
        with simt.emulate(89) as inner:
            launch(x, y)
            launch(x, y)
        assert emulation.current() is outer
        launch(x, y)
    assert (len(outer.launches), len(inner.launches)) == (2, 2)
    assert inner.launches[0].module.target == "sm_89"


def test_other_threads_enter_their_own() -> None:
    x = torch.randn(64)
    counts: dict[str, int | str] = {}

    def without() -> None:
        try:
            launch(x, torch.empty(64))
        except RuntimeError as error:
            counts["without"] = str(error)

    def within() -> None:
        with simt.emulate() as own:
            launch(x, torch.empty(64))
        counts["within"] = len(own.launches)

    with simt.emulate() as here:
        for target in (without, within):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert "simt.emulate" in str(counts["without"])
    assert (counts["within"], here.launches) == (1, [])


def test_operations_run_their_triton_kernels() -> None:
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(16, 8, 1, 1)
    with pytest.raises(ek.BackendUnavailableError, match="triton"):
        ek.ops.conv_act(x, weight, None, backend="triton")
    with simt.emulate() as found:
        y = ek.ops.conv_act(x, weight, None, backend="triton")
    assert len(found.launches) == 1
    want = ek.ops.conv_act(x, weight, None, backend="reference")
    # Products at tf32, PyTorch's default for convolutions: a relative 2^-11 of each operand.
    assert (y - want).abs().max() < 8 * 2**-10 * x.abs().max() * weight.abs().max()


@pytest.mark.parametrize(
    ("blocks", "sample", "chosen"),
    [(10, 3, [1, 5, 8]), (10, 1, [5]), (3, 8, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (8, 2, [2, 6])],
)
def test_a_sample_is_spread_over_the_grid(blocks: int, sample: int, chosen: list[int]) -> None:
    assert emulation.spread(blocks, sample) == chosen


def test_sampled_launches_run_some_blocks_alone() -> None:
    x = torch.ones(64 * SIZE)
    with simt.emulate(sample=3) as found:
        y = emulation.unwritten(torch.full_like(x, 7.0))
        assert (y == 0).all()
        launch(x, y)
        # What the other blocks would have written is read without a fault.
        launch(emulation.unwritten(torch.empty(64 * SIZE)), y)
    report = found.launches[0].report
    assert report.blocks_run == (10, 32, 53)
    assert report.unique_bytes == {"x": (3 * SIZE * 4, 0), "y": (0, 3 * SIZE * 4)}
    assert "only 3 blocks were run" in str(report)


def test_the_bound_of_a_sample_is_that_of_the_launch() -> None:
    bounds = []
    for sample in (None, 4):
        x = torch.ones(200 * SIZE)
        with simt.emulate(sample=sample) as found:
            launch(x, torch.empty_like(x))
        bounds.append(simt.bound(found.launches[0].report))
    whole, sampled = bounds
    assert sampled.work.blocks == whole.work.blocks == 200
    assert sampled.work.amounts == pytest.approx(whole.work.amounts)
    assert sampled.seconds == pytest.approx(whole.seconds)


def test_a_sample_has_at_least_one_block() -> None:
    with pytest.raises(ValueError, match="sample must be at least 1"), simt.emulate(sample=0):
        pass


def test_auto_takes_what_it_takes_on_a_gpu_on_request() -> None:
    x = torch.randn(1, 8, 4, 4).half()
    weight, bias = torch.ones(8).half(), torch.zeros(8).half()
    with simt.emulate() as without:
        expected = ek.ops.layer_norm_2d(x, weight, bias)
    with simt.emulate(auto=True) as emulated:
        found = ek.ops.layer_norm_2d(x, weight, bias)
        mixed = ek.ops.layer_norm_2d(x, weight, bias, backend="reference")
    assert (len(without.launches), len(emulated.launches)) == (0, 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mixed, expected)
    assert ek.ops.layer_norm_2d(x, weight, bias).equal(expected)
