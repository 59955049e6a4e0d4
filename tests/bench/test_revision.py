"""Measuring a revision: what runs there, with which modules, and what is left of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import revision
from bench.command import without_files
from evsam_kernels.cli.errors import CommandError

BENCH = """
import json, os, pathlib, sys
here = pathlib.Path.cwd()
assert os.environ["PYTHONPATH"] == str(here), os.environ["PYTHONPATH"]
*arguments, option, file = sys.argv[1:]
assert option == "--json"
if arguments == ["fail"]:
    sys.exit("it has failed")
built = (here / "evsam_kernels" / "_cpu.so").read_text()
text = {"schema": 1, "arguments": arguments, "built": built, "value": VALUE}
pathlib.Path(file).write_text(json.dumps(text))
"""
SETUP = "import sys, pathlib; pathlib.Path('evsam_kernels/_cpu.so').write_text('built anew')\n"


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout whose first commit measures 1 and whose second measures 2."""
    root = tmp_path / "checkout"
    for folder in ("bench", "evsam_kernels", "csrc", "python"):
        (root / folder).mkdir(parents=True)
        (root / folder / "source").write_text("one")
    (root / ".gitignore").write_text("*.so\n")
    (root / "setup.py").write_text(SETUP)
    git(root, "init", "--quiet")
    for value in ("1", "2"):
        (root / "bench" / "__main__.py").write_text(BENCH.replace("VALUE", value))
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", value)
    (root / "evsam_kernels" / "_cpu.so").write_text("built here")
    return root


def test_the_command_runs_in_a_checkout_of_the_revision(root: Path) -> None:
    result = revision.measure("HEAD~1", ["ops", "--rounds", "1"], root)
    assert (result["value"], result["arguments"]) == (1, ["ops", "--rounds", "1"])
    assert result["built"] == "built here"  # As its sources are those here.
    assert len(git(root, "worktree", "list").splitlines()) == 1


def test_other_sources_are_built(root: Path) -> None:
    (root / "csrc" / "source").write_text("two")
    assert revision.measure("HEAD", ["ops"], root)["built"] == "built anew"
    assert (root / "evsam_kernels" / "_cpu.so").read_text() == "built here"


def test_what_is_no_revision_is_named(root: Path) -> None:
    with pytest.raises(CommandError, match=r"^--compare: nowhere is neither a file nor a git"):
        revision.measure("nowhere", ["ops"], root)


def test_a_revision_that_fails_leaves_its_last_words_and_no_checkout(root: Path) -> None:
    with pytest.raises(CommandError, match=r"^--compare: HEAD was not measured: it has failed"):
        revision.measure("HEAD", ["fail"], root)
    assert len(git(root, "worktree", "list").splitlines()) == 1


def test_files_are_this_command_s_own() -> None:
    given = ["ops", "--json", "a", "--op=mbconv", "--compare=HEAD", "--csv", "b", "--plot", "c"]
    assert without_files([*given, "--rounds", "2"]) == ["ops", "--op=mbconv", "--rounds", "2"]
