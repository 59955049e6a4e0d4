"""What the launcher asks of the driver, and what it says where the driver refuses."""

from __future__ import annotations

import re
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evsam_kernels import cuda
from evsam_kernels.cuda import driver
from evsam_kernels.cuda.driver import CudaDriverError, Image, suitable


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    device_number = 0

    def get_device(self) -> int:
        return self.device_number


def on_gpu(device: int = 0) -> Tensor:
    tensor = torch.ones(4).as_subclass(OnGpu)
    tensor.device_number = device
    return tensor


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current stream of device 0 is 7000, that of device 1 is 7001."""
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7000 + device)
    )


def launch(*arguments: Any, device: int = 0, shared: int = 1024, grid: Any = (3, 2, 1)) -> Tensor:
    x = on_gpu(device)
    cuda.launch("tiny", "scale", grid, 128, shared, [("x", x), *arguments])
    return x


def test_a_launch_hands_over_what_it_was_given(standin) -> None:
    x = launch(("bias", None), ("n", -5), ("scale", 0.5), ("y", on_gpu()), ("m", 7))
    (call,) = standin.calls("cuLaunchKernel")
    function, grid, block, shared, stream, parameters = call.split(" ")
    assert (grid, block, shared, stream) == ("3,2,1", "128,1,1", "1024", "7000")
    (module,) = {line.split(" ")[0] for line in standin.calls("cuModuleGetFunction")}
    assert int(function) == 1000 + int(module)
    given = bytes.fromhex(parameters)
    assert given[:24] == struct.pack("<QQif", x.data_ptr(), 0, -5, 0.5)
    assert given[32:] == struct.pack("<i", 7)


def test_pointers_behind_single_words_are_aligned(standin) -> None:
    y = on_gpu()
    launch(("n", 1), ("y", y))
    (call,) = standin.calls("cuLaunchKernel")
    assert bytes.fromhex(call.split(" ")[-1])[8:] == struct.pack("<iiQ", 1, 0, y.data_ptr())


def test_calls_go_to_the_context_of_the_tensors(standin) -> None:
    launch(device=1)
    assert standin.calls("cuDevicePrimaryCtxRetain") == ["11"]
    assert set(standin.calls("cuCtxPushCurrent")) == {"111"}
    assert len(standin.calls("cuCtxPopCurrent")) == len(standin.calls("cuCtxPushCurrent"))
    (call,) = standin.calls("cuLaunchKernel")
    assert call.split(" ")[4] == "7001"


def test_a_module_is_loaded_once_per_device(standin) -> None:
    for device in (0, 1, 0, 1):
        launch(device=device)
    assert len(standin.calls("cuModuleLoadDataEx")) == 2
    assert len(standin.calls("cuModuleGetFunction")) == 2
    assert len(standin.calls("cuLaunchKernel")) == 4
    assert standin.calls()[-3:] == ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]


def test_threads_load_a_module_once(standin) -> None:
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        launch()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(standin.calls("cuInit")) == 1
    assert len(standin.calls("cuModuleLoadDataEx")) == 1
    assert len(standin.calls("cuLaunchKernel")) == 8


def test_much_shared_memory_is_asked_for_once(standin) -> None:
    for shared in (48 * 1024, 48 * 1024 + 16, 1024, 64 * 1024, 64 * 1024):
        launch(shared=shared)
    asked = [line.split(" ")[1:] for line in standin.calls("cuFuncSetAttribute")]
    assert asked == [["8", str(48 * 1024 + 16)], ["8", str(64 * 1024)]]


def test_a_capture_does_not_forbid_loading(standin) -> None:
    launch()
    modes = standin.calls("cuThreadExchangeStreamCaptureMode")
    assert [modes[0], len(modes)] == ["2", 2] and modes[1] != "2"
    order = standin.calls()
    first = order.index("cuThreadExchangeStreamCaptureMode")
    assert order[first + 1 : first + 3] == [
        "cuModuleLoadDataEx",
        "cuThreadExchangeStreamCaptureMode",
    ]


def test_an_empty_grid_launches_nothing(standin) -> None:
    launch(grid=(0, 1, 1))
    assert standin.calls() == []


@pytest.mark.parametrize(
    ("capability", "image"),
    [(80, "sm_80.cubin"), (86, "sm_86.cubin"), (89, "sm_86.cubin"), (90, "sm_90.cubin")],
)
def test_the_closest_cubin_is_loaded(capability: int, image: str, standin, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_CAPABILITY", str(capability))
    launch()
    assert standin.calls("cuModuleLoadDataEx") == [f"image tiny.{image}"]


def test_ptx_is_loaded_where_no_cubin_fits(standin, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_CAPABILITY", "120")
    launch()
    assert standin.calls("cuModuleLoadDataEx") == ["image tiny.ptx"]


def test_ptx_is_loaded_where_the_cubin_is_of_another_kind_of_device(standin, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_CAPABILITY", "87")
    monkeypatch.setenv("STANDIN_FAIL", "cuModuleLoadDataEx=209")
    monkeypatch.setenv("STANDIN_REFUSES", "cubin")
    launch()
    assert standin.calls("cuModuleLoadDataEx") == ["image tiny.sm_86.cubin", "image tiny.ptx"]
    assert len(standin.calls("cuLaunchKernel")) == 1


def test_suitable_compares_both_digits() -> None:
    images = [Image(Path(f"k.sm_{arch}.cubin"), arch) for arch in (80, 86, 100, 120)]
    ptx = Image(Path("k.ptx"), None)
    assert suitable([*images, ptx], (8, 5)) == [images[0], ptx]
    assert suitable([*images, ptx], (10, 3)) == [images[2], ptx]
    assert suitable([*images, ptx], (11, 0)) == [ptx]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("cuInit=100", r"cannot start the CUDA driver: CUDA_ERROR_OF_SOME_KIND: what it means"),
        ("cuDeviceGet=101", "cannot find device 0: .*nvidia-smi"),
        ("cuDevicePrimaryCtxRetain=2", "cannot enter device 0: "),
        (
            "cuModuleLoadDataEx=218",
            r"cannot load tiny\.sm_80\.cubin into device 0 \(ptxas error: line 7\): .*update the",
        ),
        ("cuModuleGetFunction=500", "cannot find the kernel scale in tiny: .*reinstall"),
        (
            "cuLaunchKernel=701",
            r"cannot launch scale, grid \(3, 2, 1\), 128 threads, 65536 bytes shared: "
            "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: what it means; choose another backend",
        ),
        ("cuFuncSetAttribute=1", "65536 bytes shared: .*choose backend='triton'"),
        ("cuCtxPushCurrent=201", "cannot enter the context of PyTorch: "),
    ],
)
def test_errors_say_what_failed_and_what_to_do(fails: str, message: str, standin, monkeypatch):
    monkeypatch.setenv("STANDIN_FAIL", fails)
    with pytest.raises(CudaDriverError, match=message):
        launch(shared=65536)
    # What failed is tried again.
    monkeypatch.delenv("STANDIN_FAIL")
    launch(shared=65536)
    assert len(standin.calls("cuCtxPopCurrent")) <= len(standin.calls("cuCtxPushCurrent"))


def test_an_old_gpu_is_named(standin, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_CAPABILITY", "75")
    with pytest.raises(CudaDriverError, match=r"device 0 has compute capability 7\.5.* need 8\.0"):
        launch()


def test_without_a_driver_the_remedy_is_named(standin, monkeypatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda_that_is_not_there.so.1")
    with pytest.raises(CudaDriverError, match=r"cannot be used: .*install the NVIDIA driver"):
        launch()


def test_without_images_the_remedy_is_named(standin) -> None:
    with pytest.raises(CudaDriverError, match=r"not built .*EVSAM_BUILD_CUDA=1"):
        cuda.launch("other", "scale", (1, 1, 1), 32, 0, [("x", on_gpu())])


def test_tensors_on_two_devices_are_refused(standin) -> None:
    with pytest.raises(
        ValueError, match=re.escape("scale must be on one device, they are on {'x'")
    ):
        launch(("y", on_gpu(1)))
    assert standin.calls("cuLaunchKernel") == []
