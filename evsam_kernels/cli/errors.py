"""The two ways a command fails: as a whole, or on one of several pictures."""

from __future__ import annotations


class CommandError(Exception):
    """The command cannot run as it was given; `main` prints the message and exits with 2."""


class PictureError(Exception):
    """One picture cannot be read, segmented or saved; the message is why, without its name."""
