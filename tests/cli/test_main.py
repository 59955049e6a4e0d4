"""The program as a whole: its subcommands, exit statuses and how it ends when interrupted."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest

import evsam_kernels
from evsam_kernels.cli import info, main
from evsam_kernels.cli.errors import CommandError

PROGRAM = [sys.executable, "-m", "evsam_kernels"]


def test_help_names_every_subcommand() -> None:
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: evsam ")
    for command in ("segment", "demo", "info", "inspect", "validate"):
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("command", ["segment", "demo", "info", "inspect", "validate"])
def test_every_subcommand_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: evsam {command} ")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"evsam-kernels {evsam_kernels.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["info", "--loudly"]])
def test_unknown_arguments_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: evsam" in capsys.readouterr().err


def test_the_status_of_the_subcommand_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "run", lambda arguments: 1)
    assert main(["info"]) == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CommandError("give a picture"), 2, "evsam info: error: give a picture\n"),
        (KeyboardInterrupt(), 130, "evsam info: interrupted\n"),
    ],
)
def test_failures_end_without_a_traceback(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(info, "run", run)
    assert main(["info"]) == status
    assert capsys.readouterr().err == message


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*PROGRAM, "info"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""
