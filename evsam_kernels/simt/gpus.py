"""GPUs and the rates that NVIDIA publishes for them, each with its source, from gpus.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Rate:
    """The most that a GPU can do of one thing.

    Attributes:
        per_second: of the whole GPU, in `unit` per second.
        unit: what is counted.
        derivation: how it follows from what is published.
        source: title and address of the publication.
    """

    per_second: float
    unit: str
    derivation: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        key: what users type, such as "a100-40gb".
        name: the vendor's name.
        arch: compute capability, 80 for sm_80.
        sms: multiprocessors.
        rates: by what they limit; those that are not published are left out.
    """

    key: str
    name: str
    arch: int
    sms: int
    rates: dict[str, Rate]


def gpu(key: str) -> Gpu:
    """The GPU called `key`.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    if key not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {key!r}")
    return GPUS[key]


def _load() -> dict[str, Gpu]:
    data = json.loads(resources.files(__package__).joinpath("gpus.json").read_text("utf-8"))
    sources = {
        key: f"{source['title']}, {source['url']}" for key, source in data["sources"].items()
    }
    return {
        key: Gpu(
            key,
            entry["name"],
            entry["arch"],
            entry["sms"],
            {
                limit: _rate(rate, entry["sms"], sources[rate["source"]])
                for limit, rate in entry["rates"].items()
            },
        )
        for key, entry in data["gpus"].items()
    }


def _rate(rate: dict[str, Any], sms: int, source: str) -> Rate:
    unit = rate["unit"]
    if "per_second" in rate:
        return Rate(rate["per_second"], unit, f"{rate['per_second']:.4g} {unit}/s", source)
    mhz = f"{rate['clock_hz'] / 1e6:g} MHz"
    if "per_clock" in rate:
        per_clock, derivation = rate["per_clock"], f"{rate['per_clock']} {unit}/clock x {mhz}"
    else:
        per_clock = rate["per_clock_per_sm"] * sms
        derivation = f"{rate['per_clock_per_sm']} {unit}/clock x {sms} multiprocessors x {mhz}"
    return Rate(per_clock * rate["clock_hz"], unit, derivation, source)


GPUS: dict[str, Gpu] = _load()
