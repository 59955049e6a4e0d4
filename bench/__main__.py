"""The command line of the benchmarks, `python -m bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import encoder
from evsam_kernels.cli.errors import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit status: 0 done, 1 numbers wrong, 2 not done."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    encoder.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except CommandError as error:
        print(f"python -m bench {arguments.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
