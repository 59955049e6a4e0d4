"""Files are written whole or not at all, and inputs are never overwritten."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from evsam_kernels.cli.output import progress, write_atomically


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old content"))
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_system_names_the_file_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(OSError) as error:
        write_atomically(path, lambda file: file.write(b"x"))
    assert str(error.value) == f"{path} cannot be written: No such file or directory"


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match=r"folder cannot be written"):
        write_atomically(path, lambda file: file.write(b"x"))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_inputs_are_kept_under_every_name(tmp_path: Path, link: object) -> None:
    kept = tmp_path / "input.png"
    kept.write_bytes(b"precious")
    path = kept
    if callable(link):
        path = tmp_path / "alias.png"
        link(kept, path)
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_atomically(path, lambda file: file.write(b"x"), keep=[tmp_path / "absent", kept])
    assert kept.read_bytes() == b"precious"
    assert path.samefile(kept)


def test_files_have_the_permissions_the_user_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    umask = os.umask(0o027)
    try:
        write_atomically(path, lambda file: file.write(b"x"))
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_progress_is_silent_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("counting", 2) as advance:
        advance()
        print("a result")
        advance()
    captured = capfd.readouterr()
    assert captured.out == "a result\n"
    assert captured.err == ""
