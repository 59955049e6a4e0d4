"""The table of GPUs says what NVIDIA publishes."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from evsam_kernels.simt.gpus import GPUS, gpu
from evsam_kernels.simt.occupancy import ARCHITECTURES

DATA = json.loads(resources.files("evsam_kernels.simt").joinpath("gpus.json").read_text("utf-8"))


@pytest.mark.parametrize("key", GPUS)
def test_the_rates_are_the_published_ones(key: str) -> None:
    """Peaks per clock times the clock give the peak that is printed, up to its rounding."""
    compared = 0
    for limit, entry in DATA["gpus"][key]["rates"].items():
        if "published" in entry:
            published = pytest.approx(entry["published"], rel=0.01)
            assert gpu(key).rates[limit].per_second == published, limit
            compared += 1
    assert compared >= 6


def test_the_a100_as_nvidia_prints_it() -> None:
    rates = gpu("a100-40gb").rates
    assert rates["tensor f16"].per_second == pytest.approx(312e12, rel=1e-3)
    assert rates["tensor tf32"].per_second == pytest.approx(156e12, rel=1e-3)
    assert 2 * rates["fp32"].per_second == pytest.approx(19.5e12, rel=1e-3)
    assert rates["L2 reads"].per_second == 5120 * 1410e6
    assert rates["DRAM"].per_second == 1555e9
    assert rates["shared memory"].per_second == 108 * 1410e6
    assert gpu("a100-80gb").rates["DRAM"].per_second == 2039e9


def test_a_geforce_accumulates_in_float32_at_half_the_rate() -> None:
    rates = gpu("rtx-4090").rates
    into_f32, into_f16 = (rates[f"tensor {kind}"].per_second for kind in ("f16", "f16 into f16"))
    assert into_f16 == 2 * into_f32


def test_every_gpu_has_a_known_architecture_and_a_source_for_every_rate() -> None:
    for entry in GPUS.values():
        assert entry.arch in ARCHITECTURES
        assert {"tensor f16", "fp32", "special function", "issue", "shared memory", "DRAM"} <= set(
            entry.rates
        )
        for rate in entry.rates.values():
            assert rate.per_second > 0
            assert "https://" in rate.source
    used = {rate["source"] for entry in DATA["gpus"].values() for rate in entry["rates"].values()}
    assert used == set(DATA["sources"])


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(ValueError, match=r"gpu must be one of a100-40gb, .*, got 'v100'"):
        gpu("v100")
