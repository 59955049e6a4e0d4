"""`python -m bench encoder` on a tiny model: from its arguments to its tables and its JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from bench import command, contest, contestants, encoder
from bench.__main__ import main
from bench.blocks import blocks
from evsam_kernels.cli.machine import machine
from evsam_kernels.numerics.budget import Errors

Bench = Callable[..., int]


@pytest.fixture
def run(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the benchmark on the tiny model and two of its blocks, on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoder, "blocks", lambda *arguments: blocks(*arguments)[9:11])
    options = ("encoder", "--model", tiny_model, "--device", "cpu", "--threads", "1")
    options = (*options, "--rounds", "1")
    return lambda *arguments: main([*options, *map(str, arguments)])


def numbers(outcome: dict[str, Any], *, whole: bool) -> None:
    assert set(outcome) == {
        *("configuration", "error", "failure"),
        *("median_ms", "samples_ms", "preempted"),
        *(["peak_bytes"] if whole else []),
    }
    assert outcome.get("peak_bytes", 1) > 0
    assert outcome["failure"] == ""
    assert outcome["configuration"]
    assert outcome["median_ms"] > 0
    assert len(outcome["samples_ms"]) >= 3
    assert 0 <= outcome["preempted"] <= 1
    assert 0 < outcome["error"] < 1e-4


def test_whole_and_blocks_are_shown_kept_and_compared(
    run: Bench, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--peers", "eager", "--json", "new.json") == 0
    out = capsys.readouterr().out
    result = json.loads(Path("new.json").read_text())

    assert set(result) == {
        *("schema", "machine", "versions", "settings"),
        *("allowed_error", "best_peer", "speedup", "contestants", "blocks"),
    }
    assert result["schema"] == 1
    assert result["machine"]["processor"] == machine().processor
    assert set(result["versions"]) == {"ours", "eager"}
    assert result["settings"] == {
        "model": tiny_model,
        "dtype": "float32",
        "batch": 1,
        "device": "cpu",
        "isa": "native",
        "rounds": 1,
        "threads": 1,
        "cores": [min(os.sched_getaffinity(0))],
    }
    parts = result["blocks"]
    assert [part["count"] for part in parts] == [2, 1]
    for part in (result, *parts):
        assert part["best_peer"] == "eager"
        assert list(part["contestants"]) == ["ours", "eager"]
        for outcome in part["contestants"].values():
            numbers(outcome, whole=part is result)
        ours, eager = (outcome["median_ms"] for outcome in part["contestants"].values())
        assert part["speedup"] == pytest.approx(eager / ours)
    whole_ms = result["contestants"]["ours"]["median_ms"]
    for part in parts:
        ours_ms = part["contestants"]["ours"]["median_ms"]
        assert part["share"] == pytest.approx(part["count"] * ours_ms / whole_ms)

    assert str(machine()) in out
    assert re.search(r"^ours \S+, eager \d", out, re.MULTILINE)
    assert re.search(
        r"^  ours +\d.* - \d.* 1\.00 +\d+ % +\d+ +\d\.\d\de-0\d +\d+ on", out, re.MULTILINE
    )
    assert re.search(r"^best peer eager: ours is \d+\.\d\d times as fast$", out, re.MULTILINE)
    assert all(part["name"] in out for part in parts)

    assert run("--peers", "eager", "--no-blocks", "--batch", 2, "--compare", "new.json") == 0
    out = capsys.readouterr().out
    change = out.split("before ms")[1]
    assert re.search(r"^  ours +\d\S* +\d\S* +[+-]\d+\.\d % *$", change, re.MULTILINE)
    assert "settings, batch: 1 before, 2 now" in change
    assert "op_list" not in out


def test_peers_that_cannot_take_part_are_shown(
    run: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = contestants.Contestant(contestants._eager, ("torch",), dtypes=())
    monkeypatch.setitem(contestants.CONTESTANTS, "eager", stubborn)
    assert run("--peers", "eager", "--no-blocks", "--json", "new.json") == 0
    out = capsys.readouterr().out
    assert re.search(r"^  eager +does not run float32 *$", out, re.MULTILINE)
    assert "No peer was timed." in out
    result = json.loads(Path("new.json").read_text())
    assert result["contestants"]["eager"]["failure"] == "does not run float32"
    assert result["best_peer"] is None


def test_wrong_numbers_are_named_and_no_time_is_reported(
    run: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "budget", lambda plain, dtype: Errors(1e-12, 1e-12))
    assert run("--peers", "eager", "--no-blocks", "--json", "new.json") == 1
    out = capsys.readouterr().out
    assert re.search(r"No times are reported, as ours failed: error \S+ exceeds 1\.00e-12", out)
    assert not re.search(r"\d ?ms\b", out.replace("median ms", "").replace("quartiles ms", ""))
    ours = json.loads(Path("new.json").read_text())["contestants"]["ours"]
    assert (ours["median_ms"], ours["samples_ms"]) == (None, [])


def test_a_wrong_block_alone_fails_too(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([False, True])

    def budget(plain: Errors, dtype: object) -> Errors:
        limit = 0.0 if next(held, False) else 0.5
        return Errors(limit, limit)

    monkeypatch.setattr(contest, "budget", budget)
    assert run("--peers", "", "--json", "new.json") == 1
    result = json.loads(Path("new.json").read_text())
    failures = [block["contestants"]["ours"]["failure"] for block in result["blocks"]]
    assert failures[0].endswith("exceeds 0.00e+00")
    assert failures[1:] == [""]
    assert (result["blocks"][0]["share"], result["blocks"][0]["speedup"]) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "eager,tvm"), "--peers: 'tvm' is none of eager, compile, onnxruntime, open"),
        (("--peers", "ours"), "--peers: 'ours' is none of"),
        (("--peers", "openvino"), "--peers: openvino needs no_such: pip install no_such, or"),
        (("--threads", "4096"), "--threads: this process may use "),
        (("--json", "no/new.json"), "--json no/new.json: there is no folder no; make it first"),
        (("--csv", "no/new.csv"), "--csv no/new.csv: there is no folder no"),
        (("--plot", "new.jpg"), "--plot must end in .png, .pdf, .svg"),
        (("--device", "cuda"), "--device cuda: PyTorch finds no GPU"),
        (("--compare", "old.json"), "--compare: old.json is neither a file nor a git revision"),
        (("--isa", "avx512"), "--isa: this processor has no avx512"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    arguments: tuple[str, ...],
    message: str,
    run: Bench,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = contestants.Contestant(contestants._openvino, ("no_such",))
    monkeypatch.setitem(contestants.CONTESTANTS, "openvino", absent)
    monkeypatch.setattr(encoder, "_FLAG_OF_ISA", {"avx512": "no such flag"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def no_process(*arguments: object) -> None:
        raise AssertionError("a contestant was started")

    monkeypatch.setattr(command, "Worker", no_process)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m bench encoder: error: {message}")


@pytest.mark.parametrize("arguments", [("--rounds", "0"), ("--dtype", "int8"), ("--batch", "x")])
def test_arguments_that_are_none(arguments: tuple[str, ...], run: Bench) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "encoder", "--help"],
        cwd=Path(bench.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "efficientvit-sam-xl1" in done.stdout
