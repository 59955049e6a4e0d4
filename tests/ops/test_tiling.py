"""How Triton kernels come by their tiles: table, timing, and the file that keeps its results."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable

import pytest
import torch

import evsam_kernels as ek
from evsam_kernels import simt
from evsam_kernels.ops import tiling
from evsam_kernels.ops.tiling import Layer, Measurements, Tile, choose
from evsam_kernels.simt.occupancy import max_shared

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("evsam_kernels._simt", reason="the executor was not built")

LAYER = Layer("conv_act", torch.float16, (64, 128), 1, 1, 5000)
RULE, OTHER, LARGE = Tile(64, 64, 32, 4, 4), Tile(128, 64, 32, 4, 4), Tile(512, 512, 64, 4, 4)


class TooLarge(Exception):
    """What a launch raises that the GPU has no room for."""


class Clock:
    """A timer that knows what each tile takes, and counts how often it was asked."""

    def __init__(self, **seconds: float) -> None:
        self.asked: list[Tile] = []
        self.seconds = {"RULE": 2.0, "OTHER": 1.0, **seconds}

    def launch(self, tile: Tile) -> None:
        if tile == LARGE:
            raise TooLarge
        self.asked.append(tile)

    def __call__(self, launch: Callable[[], object]) -> float:
        launch()
        return self.seconds["RULE" if self.asked[-1] == RULE else "OTHER"]


def chosen(layer: Layer = LAYER, clock: Clock | None = None) -> Tile:
    with simt.emulate():
        return choose(
            layer,
            RULE,
            [RULE, LARGE, OTHER],
            torch.zeros(1),
            (clock or Clock()).launch,
            TooLarge,
        )


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Two entries for a layer, for many pixels and for fewer."""
    row = {
        **{"operation": "conv_act", "channels": [64, 128], "kernel": 1, "stride": 1},
        **{"architectures": [80, 86], "estimate_us": 1.0, "by_rule_us": 2.0},
    }
    rows = [
        {**row, "least_pixels": 1000, "tile": OTHER},
        {**row, "least_pixels": 5000, "tile": LARGE},
    ]
    path = tmp_path / "tiling.json"
    path.write_text(json.dumps({"tiles": rows}))
    monkeypatch.setattr(tiling, "_TABLE", path)
    tiling.table.cache_clear()
    yield
    tiling.table.cache_clear()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, LARGE),
        ({"dtype": torch.bfloat16}, LARGE),
        ({"pixels": 4999}, OTHER),
        ({"pixels": 999}, RULE),
        ({"dtype": torch.float32}, RULE),
        ({"channels": (64, 129)}, RULE),
        ({"kernel": 3}, RULE),
        ({"stride": 2}, RULE),
        ({"operation": "fused_mbconv"}, RULE),
    ],
)
@pytest.mark.usefixtures("table")
def test_the_table_is_for_its_layers(change, expected):
    assert chosen(LAYER._replace(**change)) == expected


@pytest.mark.usefixtures("table")
def test_the_table_is_for_its_architectures():
    for arch, expected in ((86, LARGE), (90, RULE)):
        with simt.emulate(arch):
            tile = choose(LAYER, RULE, [], torch.zeros(1), lambda tile: None, TooLarge)
        assert tile == expected


@pytest.mark.usefixtures("table")
def test_timing_takes_the_fastest_that_fits_and_goes_before_the_table():
    clock = Clock()
    with tiling.measuring(clock) as measurements:
        assert [chosen(clock=clock) for _ in range(3)] == [OTHER] * 3
    assert clock.asked == [RULE, OTHER]  # Once each, whatever repeats.
    assert measurements.seconds == {LAYER: {RULE: 2.0, OTHER: 1.0}}
    assert chosen() == LARGE


def test_where_nothing_fits_the_rule_decides():
    def launch(tile: Tile) -> None:
        raise TooLarge

    with simt.emulate(), tiling.measuring(Clock()):
        assert choose(LAYER, RULE, [OTHER], torch.zeros(1), launch, TooLarge) == RULE


def test_the_file_is_read_by_the_next_process_and_kept_beside_what_others_found(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    other = LAYER._replace(pixels=7)
    clock = Clock()

    def best(measurements: Measurements, layer: Layer) -> Tile | None:
        return measurements.best(layer, [RULE, OTHER], clock.launch, TooLarge)

    first, second = Measurements(clock, path), Measurements(clock, path)
    assert best(first, LAYER) == best(second, other) == OTHER
    later = Measurements(clock, path)
    clock.asked.clear()
    assert best(later, LAYER) == best(later, other) == OTHER
    assert clock.asked == []
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["", "[1", "{}", '[[["conv_act", "half"], [1]]]', "3"])
def test_a_file_that_is_spoilt_is_made_anew(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    clock = Clock()
    assert Measurements(clock, path).best(LAYER, [RULE], clock.launch, TooLarge) == RULE
    assert len(json.loads(path.read_text())) == 1


def test_what_cannot_be_kept_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    clock = Clock()
    measurements = Measurements(clock, tmp_path / "file" / "tiles.json")
    with pytest.warns(UserWarning, match=r"tiles\.json: tiles that were timed cannot be kept"):
        assert measurements.best(LAYER, [RULE], clock.launch, TooLarge) == RULE


def test_the_file_is_of_a_gpu_and_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiling, "_version", {"triton": "3.7", "evsam-kernels": "1.0"}.get)
    path = tiling.cache_file("NVIDIA A100-SXM4/40GB")
    assert path == tmp_path / "evsam_kernels" / "tiles-NVIDIA-A100-SXM4-40GB-3.7-1.0.json"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that takes no launch, and a clock for it."""
    clock = Clock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiling, "gpu_seconds", clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    tiling._of_gpu.cache_clear()
    yield clock
    tiling._of_gpu.cache_clear()


class OnGpu:
    """Stands in for a tensor on a GPU."""

    is_cuda, device = True, "cuda:0"


@pytest.mark.parametrize(
    ("setting", "capturing", "expected"),
    [("1", False, OTHER), ("1", True, RULE), ("0", False, RULE), (None, False, RULE)],
)
def test_gpus_are_timed_where_the_environment_asks(gpu, monkeypatch, setting, capturing, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    if setting is not None:
        monkeypatch.setenv("EVSAM_AUTOTUNE", setting)
    with simt.emulate():
        tile = choose(LAYER, RULE, [OTHER], OnGpu(), gpu.launch, TooLarge)  # type: ignore[arg-type]
    assert tile == expected
    assert tiling.cache_file("A GPU").exists() == (expected == OTHER)


def test_a_setting_that_means_nothing(monkeypatch):
    monkeypatch.setenv("EVSAM_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="EVSAM_AUTOTUNE must be 0 or 1, got 'yes'"):
        chosen()


def test_the_committed_table():
    text = json.loads(tiling._TABLE.read_text())
    assert text["made_with"].startswith("python -m bench tiles")
    entries = tiling.entries()
    assert len({entry[:5] for entry in entries}) == len(entries) == len(text["tiles"]) > 0
    for entry in entries:
        assert 80 in entry.architectures
        assert entry.by_rule_us is None or entry.estimate_us < entry.by_rule_us
        loaded = entry.tile.stages * (entry.tile.bm + entry.tile.bn) * entry.tile.bk * 2
        assert loaded <= min(map(max_shared, entry.architectures))


def test_kernels_ask_for_their_layers(monkeypatch):
    """Every launch of a product is timed by its own shape, and its result is right."""
    for op in ("conv_act", "fused_mbconv"):
        kernels = importlib.import_module(f"evsam_kernels.ops.{op}.triton")
        monkeypatch.setattr(kernels, "candidates", lambda *_: [Tile(32, 32, 64, 4, 2)])
    times = iter(range(100, 0, -1))  # The later a tile is tried, the faster it seems.

    def timer(launch: Callable[[], object]) -> float:
        launch()
        return float(next(times))

    x = torch.randn(2, 16, 5, 6, dtype=torch.float16)
    weights = [torch.randn(32, 16, 3, 3) / 12, None, torch.randn(24, 32, 1, 1) / 6]
    weights = [None if weight is None else weight.half() for weight in weights]
    with simt.emulate(), tiling.measuring(timer) as measurements:
        found = ek.ops.fused_mbconv(x, *weights, stride=2, activation="relu", backend="triton")
        expand = ek.ops.conv_act(x, weights[0], stride=2, activation="relu", backend="triton")
        result = ek.ops.conv_act(expand, weights[2], backend="triton")
    assert list(measurements.seconds) == [
        Layer("fused_mbconv", torch.float16, (16, 32, 24), 3, 2, 18),
        Layer("conv_act", torch.float16, (16, 32), 3, 2, 18),
        Layer("conv_act", torch.float16, (32, 24), 1, 1, 18),
    ]
    assert all(len(seconds) == 2 for seconds in measurements.seconds.values())
    torch.testing.assert_close(found, result, rtol=1e-2, atol=1e-2)
