"""The errors that end a run on purpose, and the exit code of each.

A message says what happened, which file or key, and what to do. Mistakes in calling the library are plain
`ValueError`s; these classes are for what a run meets: its config, its data, its machine.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class SeppoError(Exception):
    """Base of them all; the command line prints the message alone and leaves with `exit_code`."""

    exit_code: int = 1


class ConfigError(SeppoError):
    """An unknown key, a value out of range, a model or file named in the config that cannot be used."""

    exit_code = 2


class DataError(SeppoError):
    """Missing, unreadable, empty or too many bad data; no space left for the cache."""

    exit_code = 3


class OutOfMemoryError(SeppoError):
    """The device's memory does not hold the run."""

    exit_code = 4


class NonFiniteError(SeppoError):
    """A loss, a gradient or an encoder's output that is not finite."""

    exit_code = 5


class CheckpointError(SeppoError):
    """No checkpoint that can be read, or none that can be written."""

    exit_code = 6


class LostProcessError(SeppoError):
    """Another process of the run is gone, or did not answer."""

    exit_code = 7
