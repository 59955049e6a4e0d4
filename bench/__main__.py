"""The command line of the benchmarks: `python -m bench`, one file per subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import acceptance, choice, decoder, encoder, everything, ops, tiles
from evsam_kernels.cli.errors import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process where None.

    Returns:
        the exit status: 0 done, 1 wrong numbers kept times from being reported, 2 not done, 130
        interrupted.

    Raises:
        SystemExit: argparse's, with status 2 for arguments it cannot parse and 0 for `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks of evsam-kernels, run from a checkout."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (ops, encoder, decoder, everything, acceptance, tiles, choice):
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except CommandError as error:
        print(f"python -m bench {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m bench {arguments.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
