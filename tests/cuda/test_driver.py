"""Launching through the driver, against a library that stands in for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evsam_kernels.cuda
from evsam_kernels.cuda.driver import Driver, DriverError, Pointer

BIG = 1 << 47  # Addresses have more than 32 bits.
STREAM = BIG + 9


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The stand-in, compiled."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("driver.cpp")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", path], check=True)
    return path


class StandIn:
    """Tells what was called."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.standin_recorded.restype = ctypes.c_char_p
        self.reset()

    def reset(self, fail: str = "", context: bool = True) -> None:
        self.library.standin_reset(fail.encode(), int(context))

    @property
    def calls(self) -> list[str]:
        return self.library.standin_recorded().decode().splitlines()

    def named(self, name: str) -> list[str]:
        return [call for call in self.calls if call.startswith(name)]


@pytest.fixture
def standin(library) -> StandIn:
    return StandIn(library)


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "scale.ptx"
    path.write_text("the PTX")
    return path


def launch(driver, image, *, device=0, shared=0, arguments=(Pointer(BIG), None, -3, 0.5)):
    driver.launch(device, image, "scale", (5, 6, 7), 128, shared, STREAM, arguments)


def test_a_launch(library, standin, image):
    launch(Driver(library), image, shared=1024)
    assert standin.calls == [
        "cuCtxGetCurrent()",
        "cuModuleLoadDataEx(the PTX)",
        "cuModuleGetFunction(60, scale)",
        f"cuLaunchKernel(70, 5 x 6 x 7, 128 x 1 x 1, 1024, {STREAM}, {BIG}, 0, -3, 0.5, 1)",
    ]


def test_modules_are_loaded_once_for_each_device(library, standin, image):
    driver = Driver(library)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: launch(driver, image, device=i % 2), range(16)))
    assert len(standin.named("cuModuleLoadDataEx")) == 2
    assert len(standin.named("cuModuleGetFunction")) == 2
    assert len(standin.named("cuLaunchKernel")) == 16


def test_much_shared_memory_is_asked_for_once(library, standin, image):
    driver = Driver(library)
    for shared in (48 << 10, 60000, 50000, 70000, 70000):
        launch(driver, image, shared=shared)
    assert standin.named("cuFuncSetAttribute") == [
        "cuFuncSetAttribute(70, 8, 60000)",
        "cuFuncSetAttribute(70, 8, 70000)",
    ]


def test_a_thread_without_a_context_gets_that_of_the_device(library, standin, image):
    standin.reset(context=False)
    launch(Driver(library), image, device=3)
    assert standin.calls[:4] == [
        "cuCtxGetCurrent()",
        "cuDeviceGet(3)",
        "cuDevicePrimaryCtxRetain(43)",
        "cuCtxSetCurrent(93)",
    ]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("cuModuleLoadDataEx", r"cannot load scale.ptx: .*218\): ptxas: line 7 is no PTX; choose"),
        ("cuModuleGetFunction", "cannot find scale in scale.ptx"),
        ("cuFuncSetAttribute", "cannot give scale 99999 bytes of shared memory"),
        ("cuLaunchKernel", "cannot launch scale with 5 x 6 x 7 blocks of 128 threads and 99999 b"),
    ],
)
def test_what_the_driver_refuses(function, said, library, standin, image):
    driver = Driver(library)
    standin.reset(fail=function)
    with pytest.raises(DriverError, match=said) as error:
        launch(driver, image, shared=99999)
    assert "a PTX JIT compilation failed (error 218)" in str(error.value)
    standin.reset()
    launch(driver, image, shared=99999)  # Nothing of the failure is kept.
    assert standin.named("cuLaunchKernel")


def test_a_machine_without_the_driver(tmp_path):
    with pytest.raises(DriverError, match=r"libcuda.so.1 cannot be loaded .*; install the driver"):
        Driver(tmp_path / "libcuda.so.1")


def test_integers_have_32_bits(library, standin, image):
    with pytest.raises(ValueError, match="32 bits, got 2147483648"):
        launch(Driver(library), image, arguments=(Pointer(1), None, 1 << 31, 0.0))


def test_tensors_go_to_their_device_and_pytorchs_stream(library, standin, image, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def on(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM)
    )
    monkeypatch.setattr(evsam_kernels.cuda, "_driver", lambda: Driver(library))
    monkeypatch.setattr(evsam_kernels.cuda, "FOLDER", image.parent)
    x = torch.zeros(4)
    arguments = [("x", x), ("bias", None), ("count", 4), ("scale", 2.0)]
    evsam_kernels.cuda.launch("scale", "scale", (1, 2, 3), 64, 16, arguments)
    assert entered == [x.device]
    assert standin.named("cuLaunchKernel") == [
        f"cuLaunchKernel(70, 1 x 2 x 3, 64 x 1 x 1, 16, {STREAM}, {x.data_ptr()}, 0, 4, 2, 1)"
    ]
    standin.reset()
    evsam_kernels.cuda.launch("scale", "scale", (1, 0, 3), 64, 16, arguments)
    assert not standin.calls


def test_gpus_that_are_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(DriverError, match=r"need a GPU of compute capability 8.0, cpu has 7.5"):
        evsam_kernels.cuda.launch("mbconv", "any", (1, 1, 1), 32, 0, [("x", torch.zeros(1))])


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "scale.sm_80.cubin"),
        ((8, 6), "scale.sm_86.cubin"),
        ((8, 7), "scale.sm_86.cubin"),
        ((9, 0), "scale.ptx"),
        ((12, 1), "scale.sm_120.cubin"),
    ],
)
def test_a_gpu_takes_machine_code_made_for_it(capability, name, image, monkeypatch):
    for arch in (80, 86, 120):
        image.with_name(f"scale.sm_{arch}.cubin").touch()
    image.with_name("other.sm_90.cubin").touch()
    monkeypatch.setattr(evsam_kernels.cuda, "FOLDER", image.parent)
    assert evsam_kernels.cuda.image_for("scale", capability).name == name
