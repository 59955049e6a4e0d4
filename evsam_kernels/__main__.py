"""Runs the command line as `python -m evsam_kernels`."""

import sys

from evsam_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
