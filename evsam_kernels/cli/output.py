"""What commands leave behind: files that are whole or absent, and progress bars."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evsam_kernels.cli.errors import CommandError
from evsam_kernels.sam.masks import import_optional

_PLOT_FORMATS = (".png", ".pdf", ".svg")


def check_report_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse values of --json and --plot that would only fail after the work was done.

    Raises:
        CommandError: a folder is missing, the plot's format is unknown, or matplotlib is missing.
    """
    for option, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None and not path.parent.is_dir():
            raise CommandError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if plot_file is None:
        return
    if plot_file.suffix.lower() not in _PLOT_FORMATS:
        raise CommandError(f"--plot must end in {', '.join(_PLOT_FORMATS)}, got {plot_file}")
    try:
        import_optional("matplotlib", "--plot")
    except ImportError as error:
        raise CommandError(str(error)) from error


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, keep: Sequence[Path] = ()
) -> None:
    """Write a file so that it never exists in part.

    The content goes to a temporary file in the same folder, which then takes the place of `path`.

    Args:
        path: the file; its folder must exist.
        write: writes the content to the binary file that it is given.
        keep: files that must not be overwritten, under whatever name.

    Raises:
        FileExistsError: `path` is one of `keep`.
        OSError: the folder or the file cannot be written.
    """
    if path.exists() and any(kept.exists() and path.samefile(kept) for kept in keep):
        raise FileExistsError(f"{path} is an input and is not overwritten")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error  # Its full text would name the temporary file.
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr where that is a terminal.

    Yields:
        what to call after each of `total` steps.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        # Lines printed meanwhile go above the bar, unless stdout is a file or a pipe.
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
