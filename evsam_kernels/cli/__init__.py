"""The command line: `evsam` and `python -m evsam_kernels`, one file per subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import evsam_kernels
from evsam_kernels.cli import demo, info, inspect, segment, validate
from evsam_kernels.cli.errors import CommandError

__all__ = ["main"]

_SUBCOMMANDS = (segment, demo, validate, inspect, info)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evsam", description="Fused kernels and drop-in modules for EfficientViT-SAM."
    )
    parser.add_argument(
        "--version", action="version", version=f"evsam-kernels {evsam_kernels.__version__}"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for subcommand in _SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process where None.

    Returns:
        the exit status: 0 done, 1 done in part or a check failed, 2 not done, 130 interrupted.

    Raises:
        SystemExit: argparse's, with status 2 for arguments it cannot parse and 0 for `--help`.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"evsam {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"evsam {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output (`| head`) is done; keep the interpreter's last flush silent too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
